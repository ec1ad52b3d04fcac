// Floats of 8 bits: E4M3, a sign, 4 bits of exponent, 3 of mantissa; all ones but the sign is NaN.
// To 16-bit ones, which is exact, and from f32.
#pragma once

#include "eight.cuh"

// What the keys or values of a head are multiplied by: one of `scales`, or 1 if there are none.
DEVICE float scale_of(uint64_t scales, uint32_t step, uint32_t head) {
    return scales == 0 ? 1 : load(reinterpret_cast<const float*>(scales) + step * head);
}

// Whether one of four codes is NaN.
DEVICE uint32_t nan_codes(uint32_t x) { return ((x & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }

// Four codes to two words of elements. NaN becomes another number.
template <class Element>
DEVICE void widen4(uint32_t x, uint32_t& low, uint32_t& high) {
    const auto widen2 = [](uint32_t codes) {
        return Element::times_e4m3_bias((codes & 0x80008000u) | ((codes & 0x7f007f00u) >> Element::e4m3_shift));
    };
    low = widen2(permute_bytes(x, 0, 0x1404));
    high = widen2(permute_bytes(x, 0, 0x3424));
}

// All bits of each of the two elements that are NaN, of the codes in the halves' low bytes.
DEVICE uint32_t nan_halves(uint32_t codes) { return (((codes & 0x007f007fu) + 0x00010001u) >> 7 & 0x00010001u) * 0xffffu; }

// The same of eight codes, as their elements lie.
DEVICE uint4 nan8(const uint2& x) {
    return uint4{nan_halves(permute_bytes(x.x, 0, 0x4140)), nan_halves(permute_bytes(x.x, 0, 0x4342)),
                 nan_halves(permute_bytes(x.y, 0, 0x4140)), nan_halves(permute_bytes(x.y, 0, 0x4342))};
}

// Eight codes to eight elements, NaN as another number.
template <class Element>
DEVICE uint4 widen8(const uint2& x) {
    uint4 to;
    widen4<Element>(x.x, to.x, to.y);
    widen4<Element>(x.y, to.z, to.w);
    return to;
}

// The same with NaN as it is.
template <class Element>
DEVICE uint4 widen8_with_nan(const uint2& x) {
    const uint4 to = widen8<Element>(x), nan = nan8(x);
    return uint4{to.x | nan.x, to.y | nan.y, to.z | nan.z, to.w | nan.w};
}

// The code of the nearest float, ties to even, and of the largest for what is beyond it.
DEVICE uint32_t narrow(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return sign | 0x7f;
    }
    // Below 2^-6 codes count units of 2^-9, which the sum with 3/2 2^23 rounds to; above, all but
    // three bits of mantissa are rounded off.
    const uint32_t small = bits_of(absolute(x) * 512 + 12582912.0f) & 15;
    const uint32_t large = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - ((127 - 7) << 3);
    const uint32_t code = magnitude < 0x3c800000u ? small : large;
    return sign | (code < 0x7e ? code : 0x7e);
}

DEVICE uint2 narrow8(const float (&x)[8]) {
    return uint2{narrow(x[0]) | narrow(x[1]) << 8 | narrow(x[2]) << 16 | narrow(x[3]) << 24,
                 narrow(x[4]) | narrow(x[5]) << 8 | narrow(x[6]) << 16 | narrow(x[7]) << 24};
}
