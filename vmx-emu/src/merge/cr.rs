//! Guest/host masks and read shadows of CR0 and CR4 (SDM Vol. 3C §25.6.6).

/// Mask and read shadow of one register in VMCS02.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrMask {
    /// Bits that L2 can't change without an exit.
    pub mask: u64,
    /// What L2 reads in them.
    pub shadow: u64,
}

impl CrMask {
    /// Combines L1's mask and shadow with the bits that L0 holds. `value` is the register's value in
    /// VMCS12's guest state.
    ///
    /// In L1's bits L2 reads L1's shadow. In bits that are L0's alone it reads what L1
    /// believes it to have, the register's own value.
    pub const fn compose(mask12: u64, shadow12: u64, l0_bits: u64, value: u64) -> Self {
        Self { mask: mask12 | l0_bits, shadow: shadow12 & mask12 | value & !mask12 }
    }

    /// What L2 reads where the register holds `real`.
    pub const fn read(self, real: u64) -> u64 {
        real & !self.mask | self.shadow & self.mask
    }

    /// Whether MOV of `new` to the register exits.
    pub const fn exits(self, new: u64) -> bool {
        (new ^ self.shadow) & self.mask != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn l2_reads_what_l1_wants_and_both_keep_their_bits(
            mask12: u64, shadow12: u64, l0: u64, value: u64, new: u64,
        ) {
            let m = CrMask::compose(mask12, shadow12, l0, value);
            // As on a processor with VMCS12 alone.
            let alone = CrMask { mask: mask12, shadow: shadow12 };
            prop_assert_eq!(m.read(value), alone.read(value));
            // A change of a bit that L1 or L0 holds exits.
            if alone.exits(new) || (new ^ value) & l0 & !mask12 != 0 {
                prop_assert!(m.exits(new));
            } else {
                prop_assert!(!m.exits(new));
            }
        }
    }
}
