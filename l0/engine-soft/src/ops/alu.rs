//! Integer arithmetic, executed by the host's own instructions so that every flag, the
//! undefined ones too, comes out as on a processor.
//!
//! Flags travel as LAHF and SETO give them: AH = SF ZF 0 AF 0 PF 1 CF, AL = OF.

use core::arch::asm;

/// A general-register operand size.
pub trait Word: crate::mmu::Scalar + Eq {
    /// Size in bytes.
    const BYTES: u8;
    /// Compare-and-swap at `p`, which may be unaligned. Returns the value found.
    ///
    /// # Safety
    /// `p` is valid for reads and writes of this size.
    unsafe fn cas(p: *mut Self, old: Self, new: Self) -> Self;
    /// Atomic exchange at `p`.
    ///
    /// # Safety
    /// As [`Self::cas`].
    unsafe fn swap(p: *mut Self, new: Self) -> Self;
    /// Sign-extended to 64 bits.
    fn sext(self) -> i64;
}

macro_rules! word {
    ($t:ty, $i:ty, $bytes:literal, $ax:tt, $class:ident, $m:literal) => {
        impl Word for $t {
            const BYTES: u8 = $bytes;
            #[inline(always)]
            unsafe fn cas(p: *mut Self, old: Self, new: Self) -> Self {
                let found: $t;
                // SAFETY: the caller's contract; LOCK CMPXCHG accepts any alignment.
                unsafe {
                    asm!(concat!("lock cmpxchg [{p}], {n", $m, "}"), p = in(reg) p, n = in($class) new,
                         inout($ax) old => found, options(nostack));
                }
                found
            }
            #[inline(always)]
            unsafe fn swap(p: *mut Self, new: Self) -> Self {
                let mut v = new;
                // SAFETY: as in `cas`.
                unsafe {
                    asm!(concat!("xchg [{p}], {v", $m, "}"), p = in(reg) p, v = inout($class) v, options(nostack));
                }
                v
            }
            #[inline(always)]
            fn sext(self) -> i64 {
                self as $i as i64
            }
        }
    };
}
word!(u8, i8, 1, "al", reg_byte, "");
word!(u16, i16, 2, "ax", reg, ":x");
word!(u32, i32, 4, "eax", reg, ":e");
word!(u64, i64, 8, "rax", reg, ":r");

/// A two-operand operation.
pub trait Bin<T> {
    /// Whether the result is written back.
    const WRITE: bool = true;
    /// Computes `a op b`; updates the flags.
    fn run(a: T, b: T, flags: &mut u16) -> T;
}
/// A one-operand operation.
pub trait Un<T> {
    /// Computes; updates the flags.
    fn run(a: T, flags: &mut u16) -> T;
}
/// A shift or rotate by a count.
pub trait Shift<T> {
    /// Computes `a op count`; updates the flags.
    fn run(a: T, count: u8, flags: &mut u16) -> T;
}

macro_rules! bin_size {
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal, plain, $write:literal) => {
        impl Bin<$t> for $name {
            const WRITE: bool = $write;
            #[inline(always)]
            fn run(a: $t, b: $t, flags: &mut u16) -> $t {
                let mut a = a;
                // SAFETY: register-only arithmetic.
                unsafe {
                    asm!(concat!($ins, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                         a = inout($class) a, b = in($class) b, out("ax") *flags, options(pure, nomem, nostack));
                }
                a
            }
        }
    };
    ($name:ident, $ins:literal, $t:ty, $class:ident, $m:literal, carry, $write:literal) => {
        impl Bin<$t> for $name {
            const WRITE: bool = $write;
            #[inline(always)]
            fn run(a: $t, b: $t, flags: &mut u16) -> $t {
                let mut a = a;
                // SAFETY: register-only arithmetic. ADD AL, 127 turns the stored OF into OF.
                unsafe {
                    asm!("add al, 127", "sahf", concat!($ins, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                         a = inout($class) a, b = in($class) b, inout("ax") *flags, options(pure, nomem, nostack));
                }
                a
            }
        }
    };
}
macro_rules! bin {
    ($(#[$d:meta])* $name:ident, $ins:literal, $kind:ident, $write:literal) => {
        $(#[$d])*
        pub struct $name;
        bin_size!($name, $ins, u8, reg_byte, "", $kind, $write);
        bin_size!($name, $ins, u16, reg, ":x", $kind, $write);
        bin_size!($name, $ins, u32, reg, ":e", $kind, $write);
        bin_size!($name, $ins, u64, reg, ":r", $kind, $write);
    };
    // No 8-bit form.
    ($(#[$d:meta])* $name:ident, $ins:literal, $kind:ident, wide) => {
        $(#[$d])*
        pub struct $name;
        bin_size!($name, $ins, u16, reg, ":x", $kind, true);
        bin_size!($name, $ins, u32, reg, ":e", $kind, true);
        bin_size!($name, $ins, u64, reg, ":r", $kind, true);
    };
}
bin!(/// ADD.
    Add, "add", plain, true);
bin!(/// OR.
    Or, "or", plain, true);
bin!(/// ADC.
    Adc, "adc", carry, true);
bin!(/// SBB.
    Sbb, "sbb", carry, true);
bin!(/// AND.
    And, "and", plain, true);
bin!(/// SUB.
    Sub, "sub", plain, true);
bin!(/// XOR.
    Xor, "xor", plain, true);
bin!(/// CMP.
    Cmp, "cmp", plain, false);
bin!(/// TEST.
    Test, "test", plain, false);
bin!(/// IMUL, two operands.
    Imul, "imul", plain, wide);
bin!(/// BSF.
    Bsf, "bsf", carry, wide);
bin!(/// BSR.
    Bsr, "bsr", carry, wide);
bin!(/// BTS, register form.
    Bts, "bts", carry, wide);
bin!(/// BTR, register form.
    Btr, "btr", carry, wide);
bin!(/// BTC, register form.
    Btc, "btc", carry, wide);

/// BT, register form.
pub struct Bt;
macro_rules! bt {
    ($($t:ty, $m:literal);*) => {$(bin_size!(Bt, "bt", $t, reg, $m, carry, false);)*};
}
bt!(u16, ":x"; u32, ":e"; u64, ":r");

macro_rules! un {
    ($(#[$d:meta])* $name:ident, $ins:literal; $($t:ty, $class:ident, $m:literal);*) => {
        $(#[$d])*
        pub struct $name;
        $(impl Un<$t> for $name {
            #[inline(always)]
            fn run(a: $t, flags: &mut u16) -> $t {
                let mut a = a;
                // SAFETY: register-only arithmetic; see `bin_size`.
                unsafe {
                    asm!("add al, 127", "sahf", concat!($ins, " {a", $m, "}"), "lahf", "seto al",
                         a = inout($class) a, inout("ax") *flags, options(pure, nomem, nostack));
                }
                a
            }
        })*
    };
}
un!(/// INC.
    Inc, "inc"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
un!(/// DEC.
    Dec, "dec"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
un!(/// NEG.
    Neg, "neg"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");

/// NOT: no flags.
pub struct Not;
impl<T: Word> Un<T> for Not {
    #[inline(always)]
    fn run(a: T, _: &mut u16) -> T {
        T::from_u64(!a.to_u64())
    }
}

macro_rules! shift {
    ($(#[$d:meta])* $name:ident, $ins:literal; $($t:ty, $class:ident, $m:literal);*) => {
        $(#[$d])*
        pub struct $name;
        $(impl Shift<$t> for $name {
            #[inline(always)]
            fn run(a: $t, count: u8, flags: &mut u16) -> $t {
                let mut a = a;
                // SAFETY: register-only arithmetic; see `bin_size`.
                unsafe {
                    asm!("add al, 127", "sahf", concat!($ins, " {a", $m, "}, cl"), "lahf", "seto al",
                         a = inout($class) a, in("cl") count, inout("ax") *flags, options(pure, nomem, nostack));
                }
                a
            }
        })*
    };
}
shift!(/// SHL.
    Shl, "shl"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
shift!(/// SHR.
    Shr, "shr"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
shift!(/// SAR.
    Sar, "sar"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
shift!(/// ROL.
    Rol, "rol"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
shift!(/// ROR.
    Ror, "ror"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
shift!(/// RCL.
    Rcl, "rcl"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");
shift!(/// RCR.
    Rcr, "rcr"; u8, reg_byte, ""; u16, reg, ":x"; u32, reg, ":e"; u64, reg, ":r");

/// One-operand MUL and IMUL: low and high halves of the product.
pub trait MulWide: Sized {
    /// Unsigned.
    fn mul(a: Self, b: Self, flags: &mut u16) -> (Self, Self);
    /// Signed.
    fn imul(a: Self, b: Self, flags: &mut u16) -> (Self, Self);
}
macro_rules! mul_wide {
    ($t:ty, $class:ident, $d:literal, $m:literal) => {
        impl MulWide for $t {
            #[inline(always)]
            fn mul(a: Self, b: Self, flags: &mut u16) -> (Self, Self) {
                mul_wide!(@ "mul", $t, $class, $d, $m, a, b, flags)
            }
            #[inline(always)]
            fn imul(a: Self, b: Self, flags: &mut u16) -> (Self, Self) {
                mul_wide!(@ "imul", $t, $class, $d, $m, a, b, flags)
            }
        }
    };
    (@ $ins:literal, $t:ty, $class:ident, $d:literal, $m:literal, $x:ident, $y:ident, $flags:ident) => {{
        let (low, found): (u64, u64);
        let high: u64;
        // SAFETY: register-only arithmetic.
        unsafe {
            asm!(concat!($ins, " {b", $m, "}"), "mov {low}, rax", "lahf", "seto al",
                 b = in($class) $y, low = out(reg) low, inout("rax") $x as u64 => found, out("rdx") high,
                 options(pure, nomem, nostack));
        }
        *$flags = found as u16;
        (low as $t, if $d { (low >> 8) as $t } else { high as $t })
    }};
}
mul_wide!(u8, reg_byte, true, "");
mul_wide!(u16, reg, false, ":x");
mul_wide!(u32, reg, false, ":e");
mul_wide!(u64, reg, false, ":r");
