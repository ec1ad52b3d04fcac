// Eight 16-bit elements, as they are moved: 16 bytes.
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
