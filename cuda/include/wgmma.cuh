// The operand lists of `wgmma.mma_async`, and what is made of them: a product for each number of
// columns that kernels use. hopper.cuh says what it does.
#pragma once

#include "device.cuh"

template <int Columns>
struct WgmmaOf;

// Eight registers of an accumulator: as operands, and their numbers in the text.
#define STAR_EIGHT(d, j)                                                                                              \
    "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]), "+f"(d[j + 1][1]),                 \
        "+f"(d[j + 1][2]), "+f"(d[j + 1][3])
#define STAR_D0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define STAR_D1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define STAR_D2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define STAR_D3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define STAR_D4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define STAR_D5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define STAR_D6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define STAR_D7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define STAR_D8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define STAR_D9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define STAR_D10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define STAR_D11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define STAR_D12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define STAR_D13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define STAR_D14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define STAR_D15 "%120, %121, %122, %123, %124, %125, %126, %127"
// The same for so many times eight.
#define STAR_TEXT_4 STAR_D0 ", " STAR_D1 ", " STAR_D2 ", " STAR_D3
#define STAR_TEXT_5 STAR_TEXT_4 ", " STAR_D4
#define STAR_TEXT_6 STAR_TEXT_5 ", " STAR_D5
#define STAR_TEXT_7 STAR_TEXT_6 ", " STAR_D6
#define STAR_TEXT_8 STAR_TEXT_7 ", " STAR_D7
#define STAR_TEXT_11 STAR_TEXT_8 ", " STAR_D8 ", " STAR_D9 ", " STAR_D10
#define STAR_TEXT_12 STAR_TEXT_11 ", " STAR_D11
#define STAR_TEXT_16 STAR_TEXT_12 ", " STAR_D12 ", " STAR_D13 ", " STAR_D14 ", " STAR_D15
#define STAR_REGISTERS_4(d) STAR_EIGHT(d, 0), STAR_EIGHT(d, 2), STAR_EIGHT(d, 4), STAR_EIGHT(d, 6)
#define STAR_REGISTERS_5(d) STAR_REGISTERS_4(d), STAR_EIGHT(d, 8)
#define STAR_REGISTERS_6(d) STAR_REGISTERS_5(d), STAR_EIGHT(d, 10)
#define STAR_REGISTERS_7(d) STAR_REGISTERS_6(d), STAR_EIGHT(d, 12)
#define STAR_REGISTERS_8(d) STAR_REGISTERS_7(d), STAR_EIGHT(d, 14)
#define STAR_REGISTERS_11(d) STAR_REGISTERS_8(d), STAR_EIGHT(d, 16), STAR_EIGHT(d, 18), STAR_EIGHT(d, 20)
#define STAR_REGISTERS_12(d) STAR_REGISTERS_11(d), STAR_EIGHT(d, 22)
#define STAR_REGISTERS_16(d) STAR_REGISTERS_12(d), STAR_EIGHT(d, 24), STAR_EIGHT(d, 26), STAR_EIGHT(d, 28), \
    STAR_EIGHT(d, 30)

#define STAR_WGMMA_TEXT(columns, eights, type)                                                                        \
    "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" STAR_TEXT_##eights "}, "
#define STAR_WGMMA_SHARED(columns, eights, type, x0, x1, x2, x3)                                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #x2 ", 0; " STAR_WGMMA_TEXT(columns, eights, type) "%" #x0        \
                 ", %" #x1 ", p, 1, 1, 0, %" #x3 "; }"                                                                \
                 : STAR_REGISTERS_##eights(d)                                                                         \
                 : "l"(a), "l"(b), "r"(static_cast<uint32_t>(accumulate)), "n"(Transposed))
#define STAR_WGMMA_REGISTERS(columns, eights, type, x0, x1, x2, x3, x4, x5, x6)                                       \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #x5 ", 0; " STAR_WGMMA_TEXT(columns, eights, type) "{%" #x0       \
                 ", %" #x1 ", %" #x2 ", %" #x3 "}, %" #x4 ", p, 1, 1, %" #x6 "; }"                                    \
                 : STAR_REGISTERS_##eights(d)                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<uint32_t>(accumulate)),        \
                   "n"(Transposed))

// The numbers are those of the operands after the accumulator.
#define STAR_WGMMA(columns, eights, x0, x1, x2, x3, x4, x5, x6)                                                       \
    template <>                                                                                                       \
    struct WgmmaOf<columns> {                                                                                         \
        template <bool Bf16, int Transposed>                                                                          \
        static DEVICE void run(float (&d)[columns / 8][4], uint64_t a, uint64_t b, bool accumulate) {                 \
            if constexpr (Bf16) {                                                                                     \
                STAR_WGMMA_SHARED(columns, eights, "bf16", x0, x1, x2, x3);                                           \
            } else {                                                                                                  \
                STAR_WGMMA_SHARED(columns, eights, "f16", x0, x1, x2, x3);                                            \
            }                                                                                                         \
        }                                                                                                             \
        template <bool Bf16, int Transposed>                                                                          \
        static DEVICE void run(float (&d)[columns / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {     \
            if constexpr (Bf16) {                                                                                     \
                STAR_WGMMA_REGISTERS(columns, eights, "bf16", x0, x1, x2, x3, x4, x5, x6);                            \
            } else {                                                                                                  \
                STAR_WGMMA_REGISTERS(columns, eights, "f16", x0, x1, x2, x3, x4, x5, x6);                             \
            }                                                                                                         \
        }                                                                                                             \
    };
STAR_WGMMA(64, 4, 32, 33, 34, 35, 36, 37, 38)
STAR_WGMMA(80, 5, 40, 41, 42, 43, 44, 45, 46)
STAR_WGMMA(96, 6, 48, 49, 50, 51, 52, 53, 54)
STAR_WGMMA(112, 7, 56, 57, 58, 59, 60, 61, 62)
STAR_WGMMA(128, 8, 64, 65, 66, 67, 68, 69, 70)
STAR_WGMMA(176, 11, 88, 89, 90, 91, 92, 93, 94)
STAR_WGMMA(192, 12, 96, 97, 98, 99, 100, 101, 102)
STAR_WGMMA(256, 16, 128, 129, 130, 131, 132, 133, 134)
