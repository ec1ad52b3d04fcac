//! Division by multiplication, for kernels: the length of a page is known only at run time.

/// What divides by `divisor`, which is in `1..2³¹`: `(magic, shift)` such that `n / divisor` is the
/// high word of `2 n · magic`, shifted right by `shift`, for every `n` below 2³¹.
///
/// With `d` the divisor, `l = ⌈log2 d⌉` and `magic = ⌈2^(31 + l) / d⌉` the excess `e = magic · d -
/// 2^(31 + l)` is less than `d ≤ 2^l`. So `n · magic / 2^(31 + l) = n / d + (n / 2³¹) (e / 2^l) /
/// d` lies above `n / d` by less than `1 / d`, and no integer is between them. As `2^(l - 1) < d`,
/// `magic` fits 32 bits.
pub(super) fn divide_by(divisor: u32) -> (u32, u32) {
    let shift = divisor.next_power_of_two().ilog2();
    ((1u64 << (31 + shift)).div_ceil(divisor.into()) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAX: u32 = (1 << 31) - 1;

    /// As `cuda/include/keys.cuh` does it.
    fn divide(n: u32, (magic, shift): (u32, u32)) -> u32 {
        ((u64::from(2 * n) * u64::from(magic)) >> 32) as u32 >> shift
    }

    fn check(n: u32, divisor: u32) {
        assert_eq!(divide(n, divide_by(divisor)), n / divisor, "{n} / {divisor}");
    }

    #[test]
    fn edges() {
        let near_powers = (0..31).flat_map(|l| [(1u32 << l) - 1, 1 << l, (1 << l) + 1]);
        for divisor in near_powers.chain([3, 48, 528, 784, MAX - 1, MAX]).filter(|d| (1..=MAX).contains(d)) {
            let multiples = [1, 2, 3, MAX / divisor].map(|k| u64::from(k) * u64::from(divisor));
            for n in
                multiples.into_iter().flat_map(|n| [n.saturating_sub(1), n, n + 1]).chain([0, MAX.into()])
            {
                check(n.min(MAX.into()) as u32, divisor);
            }
        }
    }

    proptest! {
        #[test]
        fn any_number_by_any_divisor(n in 0..=MAX, divisor in 1..=MAX, right in 0..31u32) {
            check(n, (divisor >> right).max(1));
            // One below a multiple: where a quotient is rounded up first.
            let divisor = (divisor >> right).max(1);
            check((n / divisor * divisor).saturating_sub(1), divisor);
        }
    }
}
