//! Floats of 8 bits.

/// An 8-bit float of the Open Compute Project's format E4M3, without infinities: a sign, 4 bits of
/// exponent with a bias of 7, 3 of mantissa. The largest is 448, the smallest above 0 is 2⁻⁹; all
/// ones but the sign is NaN.
///
/// Keys and values of this type come with [`Scales`](crate::Scales).
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub struct F8E4M3(u8);

// SAFETY: the byte 0 is the float 0.
unsafe impl bytemuck::Zeroable for F8E4M3 {}
// SAFETY: a byte, of which every value is a float.
unsafe impl bytemuck::Pod for F8E4M3 {}

/// The values of all codes.
static VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value_of(code as u8);
        code += 1;
    }
    values
};

const fn value_of(code: u8) -> f32 {
    let (exponent, mantissa) = (code >> 3 & 15, (code & 7) as f32);
    let magnitude = match exponent {
        // 2⁻⁹ for each unit.
        0 => mantissa / 512.0,
        15 if code & 7 == 7 => f32::NAN,
        _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent as u32 + 120) << 23),
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

impl F8E4M3 {
    /// The largest value.
    pub const MAX: Self = Self(0x7e);
    /// NaN.
    pub const NAN: Self = Self(0x7f);

    /// The float of a code.
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    /// Its code.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// The same value in f32; exact.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        VALUES[self.0 as usize]
    }

    /// The nearest value, ties to even; beyond the largest, infinities included, the largest of
    /// that sign. NaN stays.
    #[inline(always)]
    pub fn from_f32(value: f32) -> Self {
        /// Of f32: bits of mantissa that do not fit.
        const CUT: u32 = 23 - 3;
        /// The smallest value of a whole mantissa, 2⁻⁶.
        const NORMAL: f32 = 1.0 / 64.0;
        let sign = (value.to_bits() >> 24) as u8 & 0x80;
        let magnitude = value.abs();
        if magnitude.is_nan() {
            return Self(sign | Self::NAN.0);
        }
        let code = if magnitude < NORMAL {
            (magnitude * 512.0).round_ties_even() as u32
        } else {
            let bits = magnitude.to_bits();
            let rounded = bits + (1 << (CUT - 1)) - 1 + (bits >> CUT & 1);
            (rounded >> CUT) - ((127 - 7) << 3)
        };
        Self(sign | code.min(u32::from(Self::MAX.0)) as u8)
    }
}

impl std::fmt::Debug for F8E4M3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_f32().fmt(f)
    }
}

impl std::fmt::Display for F8E4M3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_f32().fmt(f)
    }
}

impl PartialEq for F8E4M3 {
    fn eq(&self, other: &Self) -> bool {
        self.to_f32() == other.to_f32()
    }
}

impl PartialOrd for F8E4M3 {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.to_f32().partial_cmp(&other.to_f32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of the format's table.
    #[test]
    fn codes_are_those_of_the_format() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xc0, -2.0),
        ] {
            assert_eq!(F8E4M3::from_bits(code).to_f32(), value, "{code:#x}");
        }
        assert!(F8E4M3::from_bits(0x7f).to_f32().is_nan() && F8E4M3::from_bits(0xff).to_f32().is_nan());
        assert!(F8E4M3::from_bits(0x80).to_f32().is_sign_negative());
    }

    #[test]
    fn every_code_comes_back() {
        for code in 0..=255 {
            let float = F8E4M3::from_bits(code);
            assert_eq!(F8E4M3::from_f32(float.to_f32()).to_bits(), code);
        }
    }

    /// Between two neighbours: the nearer one, and at the middle the even code.
    #[test]
    fn rounding_is_to_the_nearest_and_ties_are_even() {
        for code in 0..0x7e {
            let [low, high] = [code, code + 1].map(|code| F8E4M3::from_bits(code).to_f32());
            let middle = (low + high) / 2.0;
            let even = code + (code & 1);
            for sign in [1.0, -1.0] {
                let bits = |x: f32| F8E4M3::from_f32(sign * x).to_bits() & 0x7f;
                assert_eq!(bits(middle), even);
                assert_eq!(bits(middle.next_down()), code);
                assert_eq!(bits(middle.next_up()), code + 1);
            }
        }
    }

    #[test]
    fn what_is_too_large_is_the_largest_and_nan_stays() {
        for large in [449.0, 464.0, 1e30, f32::INFINITY] {
            assert_eq!(F8E4M3::from_f32(large).to_bits(), 0x7e);
            assert_eq!(F8E4M3::from_f32(-large).to_bits(), 0xfe);
        }
        assert!(F8E4M3::from_f32(f32::NAN).to_f32().is_nan());
        assert!(F8E4M3::from_f32(-f32::NAN).to_f32().is_nan());
    }
}
