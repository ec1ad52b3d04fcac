// Eight elements, as they are moved: 16 bytes of 16-bit ones, or 32 bytes of f32.
#pragma once

#include "device.cuh"

template <class Element>
DEVICE void unpack8(const uint4& x, float (&to)[8]) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = Element::unpack(words[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
}

template <class Element>
DEVICE uint4 pack8(const float (&x)[8]) {
    return uint4{Element::pack(x[0], x[1]), Element::pack(x[2], x[3]), Element::pack(x[4], x[5]),
                 Element::pack(x[6], x[7])};
}

// Eight f32, 32 bytes.
DEVICE void unpack8(const float4& low, const float4& high, float (&to)[8]) {
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}
DEVICE void write8(float* to, const float (&x)[8]) {
    store(reinterpret_cast<float4*>(to), float4{x[0], x[1], x[2], x[3]});
    store(reinterpret_cast<float4*>(to) + 1, float4{x[4], x[5], x[6], x[7]});
}

// All bits of each of two elements whose exponent is all ones: NaN or infinity. One more in the
// exponent's last place then carries into the sign's.
template <class Element>
DEVICE uint32_t not_finite2(uint32_t x) {
    constexpr uint32_t ones = Element::exponents & ~(Element::exponents << 1);
    return (((x & Element::exponents) + ones) >> 15 & 0x00010001u) * 0xffffu;
}
template <class Element>
DEVICE uint4 not_finite8(const uint4& x) {
    return uint4{not_finite2<Element>(x.x), not_finite2<Element>(x.y), not_finite2<Element>(x.z),
                 not_finite2<Element>(x.w)};
}
DEVICE bool any_bit(const uint4& x) { return (x.x | x.y | x.z | x.w) != 0; }
