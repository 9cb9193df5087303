//! Every implemented instruction of user mode against the host's own processor: the same
//! bytes executed natively and in the engine, from the same random state, must agree in
//! registers, defined flags, memory and fault.
//!
//! Not compared: system instructions, control flow, save areas of the XSAVE family (the host's
//! have more components), and modes other than 64-bit.

// The native side is a processor driven by hand.
#![allow(clippy::undocumented_unsafe_blocks)]

mod generate;
mod guest;
mod layout;
mod native;
mod state;

use iced_x86::{Code, Mnemonic, OpKind};

use generate::{Random, Sample};
use guest::Guest;
use layout::DATA_SIZE;
use native::Native;
use state::{Data, End, State};

/// The six status flags.
pub const STATUS: u64 = 0x8d5;
/// Flags compared: those and DF.
pub const FLAGS: u64 = STATUS | 1 << 10;

struct Bench {
    native: Native,
    guest: Guest,
    random: Random,
    data: Box<Data>,
    after_native: Box<Data>,
    after_guest: Box<Data>,
    cases: u64,
    failures: Vec<String>,
}

/// At most this many differences are told.
const MAX_FAILURES: usize = 60;

impl Bench {
    fn new(seed: u64, bits: u32) -> Self {
        let mut b = Self {
            native: Native::new(bits).expect("fixed addresses for the native side"),
            guest: Guest::new(bits),
            random: Random { seed, bits },
            data: Box::new([0; DATA_SIZE]),
            after_native: Box::new([0; DATA_SIZE]),
            after_guest: Box::new([0; DATA_SIZE]),
            cases: 0,
            failures: Vec::new(),
        };
        generate::fill(&mut b.random, &mut b.data);
        b.native.set_read_only(&b.data);
        b.guest.set_read_only(&b.data);
        b
    }

    /// Compares `count` states of one instruction.
    fn instruction(&mut self, s: &Sample, count: usize) {
        self.native.set_instruction(&s.bytes);
        self.guest.set_instruction(&s.bytes);
        for _ in 0..count {
            let before = generate::state(&mut self.random, s);
            if splits_lock(s, &before) {
                continue;
            }
            if self.random.one_in(8) {
                generate::fill(&mut self.random, &mut self.data);
            }
            if !self.case(s, &before) {
                return;
            }
        }
    }

    fn case(&mut self, s: &Sample, before: &State) -> bool {
        self.cases += 1;
        self.native.set_data(&self.data);
        self.guest.set_data(&self.data);
        let (mut native, mut guest) = (before.clone(), before.clone());
        let native_end = self.native.run(&mut native, s.bytes.len());
        let guest_end = self.guest.run(&mut guest);
        early_state(s, native_end, &mut native, before);
        early_state(s, guest_end, &mut guest, before);
        let (native_end, guest_end) = (comparable(s, native_end), comparable(s, guest_end));
        self.native.data(&mut self.after_native);
        self.guest.data(&mut self.after_guest);
        let any_byte = is_byte_masked(s) && matches!(native_end, End::Fault(14, ..));
        if !any_byte && !undefined_result(s, before, &native) {
            let mut text = String::new();
            difference(&mut text, s, before, (&native, native_end), (&guest, guest_end));
            let pages = 2 * layout::PAGE;
            // An x87 image whose second page faults may be half written on hardware.
            let partial = (is_x87_image(s) || is_all_registers(s)) && matches!(native_end, End::Fault(..));
            if !partial && self.after_native[..pages] != self.after_guest[..pages] {
                let n = (0..pages).find(|n| self.after_native[*n] != self.after_guest[*n]).unwrap_or(0);
                let end = (n + 16).min(pages);
                text += &format!(
                    "  memory at {:#x}: {:02x?} native, {:02x?} engine, {:02x?} before\n",
                    layout::DATA + n as u64,
                    &self.after_native[n..end],
                    &self.after_guest[n..end],
                    &self.data[n..end],
                );
            }
            if !text.is_empty() {
                self.failures.push(format!(
                    "{:?} {:02x?} {}\n{text}  registers before {:x?}\n",
                    s.instruction.code(),
                    s.bytes,
                    s.instruction,
                    before.gpr
                ));
                return false;
            }
        }
        true
    }

    fn finish(self) {
        let n = self.failures.len();
        println!("{} cases, {n} instructions differ", self.cases);
        for f in self.failures.iter().take(MAX_FAILURES) {
            println!("{f}");
        }
        assert_eq!(n, 0, "instructions differ from the host's");
    }
}

/// Instructions whose memory operand is accessed field by field, in an order of the
/// processor's choice.
fn is_x87_image(s: &Sample) -> bool {
    use Mnemonic as M;
    matches!(
        s.instruction.mnemonic(),
        M::Fldenv
            | M::Fnstenv
            | M::Frstor
            | M::Fnsave
            | M::Fstp
            | M::Fbstp
            | M::Fld
            | M::Fbld
            | M::Fxsave
            | M::Fxrstor
            | M::Fxsave64
            | M::Fxrstor64
    )
}

/// PUSHA and POPA, which processors leave half done when they fault.
fn is_all_registers(s: &Sample) -> bool {
    use Mnemonic as M;
    matches!(s.instruction.mnemonic(), M::Pusha | M::Pushad | M::Popa | M::Popad)
}

fn is_save_area(s: &Sample) -> bool {
    use Mnemonic as M;
    matches!(s.instruction.mnemonic(), M::Fxsave | M::Fxrstor | M::Fxsave64 | M::Fxrstor64)
}

/// Stores where disabled bytes may fault or not, by the processor's choice.
fn is_byte_masked(s: &Sample) -> bool {
    use Mnemonic as M;
    matches!(s.instruction.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
}

fn is_masked(s: &Sample) -> bool {
    use Mnemonic as M;
    matches!(s.instruction.mnemonic(), M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

/// Processors enter the MMX state, and set flags of a conversion to memory, before they notice a
/// fault; the engine leaves no trace.
fn early_state(s: &Sample, end: End, state: &mut State, before: &State) {
    let i = &s.instruction;
    if !matches!(end, End::Fault(..)) {
        return;
    }
    if i.op_kinds().zip(0..).any(|(k, n)| k == OpKind::Register && i.op_register(n).is_mm()) {
        state.x87 = before.x87;
    }
    // Whether other elements were inexact is not told when one overflowed or underflowed.
    if matches!(end, End::Fault(19, ..)) && state.mxcsr & !(state.mxcsr >> 7) & 0x18 != 0 {
        state.mxcsr = state.mxcsr & !0x20 | before.mxcsr & 0x20;
    }
    if is_all_registers(s) {
        *state = before.clone();
    }
    // A dot product stops within one of its steps.
    if matches!(i.mnemonic(), Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd) {
        state.mxcsr = before.mxcsr;
    }
    // Each call of `emulate` is an instruction of its own for the flags that a fault restores.
    if generate::is_string(i) {
        state.rflags = before.rflags;
    }
    // How far a gather that faults has got with the upper halves differs.
    if i.is_vsib() {
        for r in [i.op0_register(), i.op2_register()] {
            let v = &mut state.vectors[r.number()];
            let used = if i.is_vsib64() && i.memory_size().size() == 4 && i.memory_index().is_xmm() {
                1
            } else if r.is_xmm() {
                2
            } else {
                4
            };
            v[used..].fill(0);
        }
    }
    if i.mnemonic() == Mnemonic::Vcvtps2ph && !matches!(end, End::Fault(19, ..)) {
        state.mxcsr = before.mxcsr;
    }
}

/// The end as far as the SDM defines it.
fn comparable(s: &Sample, end: End) -> End {
    match end {
        // Misaligned and not canonical: which comes first is not said.
        End::Fault(12, ..) if s.instruction.mnemonic() == Mnemonic::Cmpxchg16b => End::Fault(13, 0, 0),
        // Past a limit of 4 GiB an access may fault or wrap (SDM Vol. 3A §5.3).
        End::Fault(14, _, 0xffff_ffc0..=0xffff_ffff) => End::Fault(13, 0, 0),
        // The upper half is the host's kernel, present or not.
        End::Fault(14, code, address) if address >> 63 != 0 => End::Fault(14, code & !1, address),
        // These span two pages that fault.
        End::Fault(14, ..) if is_save_area(s) || is_all_registers(s) => End::Fault(14, 0, 0),
        End::Fault(14, code, address) if is_x87_image(s) || is_masked(s) => {
            End::Fault(14, code, address & !0xfff)
        }
        end => end,
    }
}

/// A locked access that crosses a cache line stops the host's bus, which its kernel may punish.
fn splits_lock(s: &Sample, state: &State) -> bool {
    let i = &s.instruction;
    let locked = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
    if !locked || !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        return false;
    }
    let address = i
        .virtual_address(0, 0, |r, _, _| {
            Some(if r.is_gpr() {
                let v = state.gpr[r.full_register().number()];
                if r.is_gpr32() { v as u32 as u64 } else { v }
            } else {
                0
            })
        })
        .or_else(|| {
            i.virtual_address(1, 0, |r, _, _| {
                Some(if r.is_gpr() { state.gpr[r.full_register().number()] } else { 0 })
            })
        });
    // Bit strings move the address by whole operands.
    let size = i.memory_size().size() as u64;
    address.is_some_and(|a| (a & 63) + size > 64)
        || i.op1_kind() == OpKind::Register && is_bit(i.mnemonic()) && address.is_some_and(|a| a % size != 0)
}

fn is_bit(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
}

/// Whether the result is not defined. Double shifts of 16-bit operands by more than 16 have no defined result (SDM Vol. 2B, SHLD).
fn undefined_result(s: &Sample, before: &State, after: &State) -> bool {
    let i = &s.instruction;
    match i.code() {
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => i.immediate8() & 31 > 16,
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => before.gpr[1] & 31 > 16,
        Code::Bswap_r16 => true,
        // With a source of zero, processors differ in the upper half.
        Code::Bsf_r32_rm32 | Code::Bsr_r32_rm32 => after.rflags & 1 << 6 != 0,
        _ => false,
    }
}

fn difference(text: &mut String, s: &Sample, before: &State, native: (&State, End), guest: (&State, End)) {
    let ((n, native_end), (g, guest_end)) = (native, guest);
    if native_end != guest_end {
        *text += &format!("  end {native_end:x?} native, {guest_end:x?} engine\n");
        return;
    }
    for k in 0..16 {
        if n.gpr[k] != g.gpr[k] {
            *text += &format!(
                "  {}: {:#x} native, {:#x} engine, {:#x} before\n",
                x86_spec::reg::gpr::NAMES[k],
                n.gpr[k],
                g.gpr[k],
                before.gpr[k]
            );
        }
        if n.vectors[k] != g.vectors[k] {
            *text += &format!(
                "  ymm{k}: {:x?} native, {:x?} engine, {:x?} before\n",
                n.vectors[k], g.vectors[k], before.vectors[k]
            );
        }
    }
    let undefined = if matches!(native_end, End::Next(_)) { s.undefined } else { 0 };
    if (n.rflags ^ g.rflags) & !undefined != 0 {
        *text += &format!(
            "  flags {:#x} native, {:#x} engine, {:#x} before, undefined {undefined:#x}\n",
            n.rflags, g.rflags, before.rflags
        );
    }
    if n.mxcsr != g.mxcsr {
        *text +=
            &format!("  mxcsr {:#x} native, {:#x} engine, {:#x} before\n", n.mxcsr, g.mxcsr, before.mxcsr);
    }
    // How much of a loaded pointer is kept differs between processors.
    let loads_pointers = matches!(s.instruction.mnemonic(), Mnemonic::Fxrstor64);
    for (range, name) in [(0..6, "x87 control"), (6..24, "x87 pointers")] {
        if loads_pointers && range.start == 6 {
            continue;
        }
        if n.x87[range.clone()] != g.x87[range.clone()] {
            *text += &format!(
                "  {name}: {:02x?} native, {:02x?} engine, {:02x?} before\n",
                &n.x87[range.clone()],
                &g.x87[range.clone()],
                &before.x87[range]
            );
        }
    }
    for k in 0..8 {
        let range = 32 + 16 * k..42 + 16 * k;
        if n.x87[range.clone()] != g.x87[range.clone()] {
            *text += &format!(
                "  st{k}: {:02x?} native, {:02x?} engine, {:02x?} before\n",
                &n.x87[range.clone()],
                &g.x87[range.clone()],
                &before.x87[range]
            );
        }
    }
}

/// Compares `rounds` instructions of every form, `states` states each; stops at `limit` cases.
fn compare(bits: u32, seed: u64, rounds: usize, states: usize, limit: u64) {
    let mut bench = Bench::new(seed, bits);
    let only = std::env::var("ONLY").ok();
    let forms: Vec<Code> = Code::values()
        .filter(|c| generate::included(*c, bits))
        .filter(|c| only.as_ref().is_none_or(|o| format!("{c:?}").contains(o.as_str())))
        .collect();
    println!("{} forms", forms.len());
    let trace = std::env::var_os("TRACE").is_some();
    let mut reached = std::collections::HashSet::new();
    while bench.cases < limit {
        for code in &forms {
            let failed = bench.failures.len();
            if trace {
                eprintln!("{code:?}");
            }
            for _ in 0..rounds {
                // Some register choices can't be encoded.
                let sample = (0..20).find_map(|_| generate::sample(&mut bench.random, *code));
                if let Some(s) = sample {
                    reached.insert(*code);
                    bench.instruction(&s, states);
                }
                if bench.failures.len() > failed {
                    break;
                }
            }
        }
        if bench.failures.len() > MAX_FAILURES {
            break;
        }
    }
    let missing: Vec<_> = forms.iter().filter(|c| !reached.contains(c)).collect();
    println!("forms without a sample: {missing:?}");
    bench.finish();
}

/// A fixed-seed subset.
#[test]
fn host_and_engine_agree() {
    compare(64, 1, 4, 6, 1);
}

/// The same in 32-bit code, which the host executes in compatibility mode.
#[test]
fn host_and_engine_agree_in_32_bit_code() {
    compare(32, 3, 4, 6, 1);
}

/// `cargo test --release -p engine-soft --test differential -- --ignored --nocapture`;
/// environment: `SEED` and `CASES` (numbers), `ONLY` (part of a form's name), `TRACE` (tells each
/// form).
#[test]
#[ignore = "takes minutes"]
fn host_and_engine_agree_in_ten_million_cases() {
    let number = |name: &str| std::env::var(name).ok().and_then(|s| s.parse().ok());
    let (seed, cases) = (number("SEED").unwrap_or(2), number("CASES").unwrap_or(10_000_000));
    compare(64, seed, 4, 32, cases);
    compare(32, seed, 4, 32, cases / 4);
}
