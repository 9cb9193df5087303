//! Translated code against the interpreter: random programs from random states must end alike.

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use x86_spec::controls::PinbasedControls;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{gpr, rflags};

use crate::system::testutil::{CODE, DATA, Guest, NOT_PRESENT, STACK};

/// States that each program starts from.
const STATES: u64 = 4;
/// Ticks of the preemption timer, some tens of milliseconds: a few random programs never end.
const TICKS: u32 = 1 << 20;
/// Bytes of data that are compared.
const DATA_SIZE: usize = 0x3000;

struct Random(TestRng);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0.next_u64() % n
    }
    fn byte(&mut self) -> u8 {
        self.0.next_u64() as u8
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick(&mut self, from: &[u8]) -> u8 {
        from[self.below(from.len() as u64) as usize]
    }

    /// ModRM and what follows it, with `reg` or a random register field.
    fn modrm(&mut self, out: &mut Vec<u8>, reg: Option<u8>) {
        let reg = reg.unwrap_or_else(|| self.byte() & 7);
        match self.below(6) {
            0..3 => out.push(0xc0 | reg << 3 | self.byte() & 7),
            3 => {
                // [base + disp8]; with RSP's number a SIB byte.
                let rm = self.byte() & 7;
                out.push(0x40 | reg << 3 | rm);
                if rm == 4 {
                    out.push(self.byte());
                }
                out.push(self.byte());
            }
            4 => {
                // [base + index * scale]
                out.push(0x44 | reg << 3);
                out.push(self.byte());
                out.push(self.byte());
            }
            _ => {
                // [rip + disp32] into the data.
                out.push(5 | reg << 3);
                let disp = (DATA - CODE) as u32 + self.below(0xf00) as u32;
                out.extend_from_slice(&disp.to_le_bytes());
            }
        }
    }

    fn immediate(&mut self, out: &mut Vec<u8>, size: usize) {
        for _ in 0..size {
            let b = self.pick(&[0, 1, 0x7f, 0x80, 0xff]);
            out.push(if self.one_in(2) { b } else { self.byte() });
        }
    }

    /// One instruction of those that translated code does in place, or one that it calls.
    fn instruction(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.one_in(24) {
            out.push(self.pick(&[0xf0, 0x64, 0x65, 0x67]));
        }
        let narrow = self.one_in(6);
        if narrow {
            out.push(0x66);
        }
        let rex = if self.one_in(3) { 0 } else { 0x40 | self.byte() & 0xf };
        if rex != 0 {
            out.push(rex);
        }
        let full = if rex & 8 != 0 || !narrow { 4 } else { 2 };
        match self.below(30) {
            0..6 => {
                out.push(self.byte() & 0x38 | self.byte() & 3);
                self.modrm(&mut out, None);
            }
            6..8 => {
                let opcode = self.pick(&[0x80, 0x81, 0x83]);
                out.push(opcode);
                self.modrm(&mut out, None);
                self.immediate(&mut out, if opcode == 0x81 { full } else { 1 });
            }
            8..11 => {
                out.push(
                    self.pick(&[0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8a, 0x8b, 0x8b, 0x89, 0x8d, 0x63]),
                );
                self.modrm(&mut out, None);
            }
            11 => {
                let opcode = self.pick(&[0xc6, 0xc7]);
                out.push(opcode);
                self.modrm(&mut out, Some(0));
                self.immediate(&mut out, if opcode == 0xc7 { full } else { 1 });
            }
            12..14 => {
                let opcode = self.pick(&[0xc0, 0xc1, 0xd0, 0xd1, 0xd2, 0xd3]);
                out.push(opcode);
                self.modrm(&mut out, None);
                if opcode < 0xd0 {
                    self.immediate(&mut out, 1);
                }
            }
            14 => {
                let (opcode, kind) = (self.pick(&[0xf6, 0xf7]), self.byte() & 3);
                out.push(opcode);
                self.modrm(&mut out, Some(kind));
                if kind < 2 {
                    self.immediate(&mut out, if opcode == 0xf7 { full } else { 1 });
                }
            }
            15..17 => {
                out.push(self.pick(&[0xfe, 0xff]));
                let kind = self.byte() & 1;
                self.modrm(&mut out, Some(kind));
            }
            17..19 => out.push(0x50 | self.byte() & 0xf),
            19 => match self.below(4) {
                0 => out.extend_from_slice(&[0x6a, self.byte()]),
                1 => {
                    out.push(0x68);
                    self.immediate(&mut out, full);
                }
                2 => {
                    out.push(0xb8 | self.byte() & 7);
                    self.immediate(&mut out, if rex & 8 != 0 { 8 } else { full });
                }
                _ => {
                    out.push(0xb0 | self.byte() & 7);
                    self.immediate(&mut out, 1);
                }
            },
            20 => out.push(self.pick(&[0x98, 0x99, 0x90, 0x9e, 0x9f, 0xf5, 0xf8, 0xf9, 0xc9])),
            21..23 => {
                out.extend_from_slice(&[
                    0x0f,
                    self.pick(&[0xb6, 0xb7, 0xbe, 0xbf, 0xaf, 0xb0, 0xb1, 0xc0, 0xc1]),
                ]);
                self.modrm(&mut out, None);
            }
            23..25 => {
                out.extend_from_slice(&[0x0f, 0x40 | self.byte() & 0xf]);
                self.modrm(&mut out, None);
            }
            25 => {
                out.extend_from_slice(&[0x0f, 0x90 | self.byte() & 0xf]);
                self.modrm(&mut out, None);
            }
            26 => {
                let opcode = self.pick(&[0x69, 0x6b]);
                out.push(opcode);
                self.modrm(&mut out, None);
                self.immediate(&mut out, if opcode == 0x69 { full } else { 1 });
            }
            27 => {
                out.extend_from_slice(&[0x0f, 0xba]);
                let kind = 4 | self.byte() & 3;
                self.modrm(&mut out, Some(kind));
                self.immediate(&mut out, 1);
            }
            28 => {
                out.extend_from_slice(&[0x0f, self.pick(&[0xa3, 0xab, 0xb3, 0xbb, 0xbc, 0xbd])]);
                self.modrm(&mut out, None);
            }
            _ => out.extend_from_slice(&[0x0f, 0xc8 | self.byte() & 7]),
        }
        out
    }

    /// A program: straight pieces with jumps and calls forward over one instruction, and HLT.
    fn program(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        for _ in 0..1 + self.below(14) {
            let i = self.instruction();
            let over = i.len() as u8;
            match self.below(12) {
                0 | 1 => out.extend_from_slice(&[0x70 | self.byte() & 0xf, over]),
                2 => out.extend_from_slice(&[0xeb, over]),
                3 => out.extend_from_slice(&[0xe8, over, 0, 0, 0]),
                // call over, then return behind the call: `ret` of a pushed address.
                4 => out.extend_from_slice(&[0xe8, 2, 0, 0, 0, 0xeb, 1, 0xc3]),
                // lea r11, [rip + 3]; jmp or call r11, back to a register program.
                5 => {
                    out.extend_from_slice(&[0x4c, 0x8d, 0x1d, 3, 0, 0, 0, 0x41, 0xff]);
                    out.push(self.pick(&[0xe3, 0xd3]));
                }
                _ => {}
            }
            out.extend_from_slice(&i);
        }
        out.push(0xf4);
        out
    }

    fn value(&mut self) -> u64 {
        match self.below(10) {
            0..5 => DATA + self.below(DATA_SIZE as u64 - 0x200),
            // Across the end of a page.
            5 => DATA + 0x1000 - self.below(9),
            6 => self.below(40),
            7 => self.0.next_u64(),
            8 => NOT_PRESENT - self.below(9),
            _ => [0, u64::MAX, 0x8000_0000, 0x7fff_ffff_ffff_ffff, 0x8000_0000_0000][self.below(5) as usize],
        }
    }
}

/// What a run left behind.
#[derive(Debug, PartialEq)]
struct End {
    exit: engine::VmExit,
    gpr: [u64; 16],
    rip: u64,
    rsp: u64,
    rflags: u64,
    cr2: u64,
    instructions: u64,
    data: Vec<u8>,
    stack: Vec<u8>,
}

/// Runs a program in `g` from a state.
fn run(g: &mut Guest, gpr: [u64; 16], flags: u64, data: &[u8]) -> End {
    g.regs.gpr = gpr;
    g.vmcs.guest.rsp = gpr[gpr::RSP];
    g.vmcs.guest.rip = CODE;
    g.vmcs.guest.rflags = flags;
    g.vmcs.guest.preemption_timer = TICKS;
    g.regs.cr2 = 0;
    g.write(DATA, data);
    g.write(STACK - 0x400, &[0; 0x400]);
    let before = g.vcpu.cpu().icount;
    let exit = g.enter();
    let instructions = g.vcpu.cpu().icount - before;
    let mut end = End {
        exit,
        gpr: g.regs.gpr,
        rip: g.vmcs.guest.rip,
        rsp: g.vmcs.guest.rsp,
        rflags: g.vmcs.guest.rflags,
        cr2: g.regs.cr2,
        instructions,
        data: vec![0; DATA_SIZE],
        stack: vec![0; 0x400],
    };
    g.memory.read(memory::MachineAddr(DATA), &mut end.data).unwrap();
    g.memory.read(memory::MachineAddr(STACK - 0x400), &mut end.stack).unwrap();
    end
}

fn guest(threshold: u32) -> Guest {
    let mut g = Guest::long(&[]);
    g.vmcs.guest.segments[x86_spec::segment::seg::FS].base = 0x100;
    g.vmcs.guest.segments[x86_spec::segment::seg::GS].base = 0xffff_ffff_ffff_ff00;
    g.vmcs.controls.pin |= PinbasedControls::VMX_PREEMPTION_TIMER;
    g.vcpu.cpu().translator.set_threshold(threshold);
    g
}

/// The same end by both ways, to the byte and the flag, faults in the middle of a block included.
#[test]
fn translated_code_does_what_the_interpreter_does() {
    compare(3_000, &[0; 32]);
}

/// The same for longer: `cargo test --release -p engine-soft slow_ -- --ignored`.
#[test]
#[ignore = "slow"]
fn slow_translated_code_does_what_the_interpreter_does() {
    compare(200_000, &[1; 32]);
}

fn compare(programs: u64, seed: &[u8; 32]) {
    let mut r = Random(TestRng::from_seed(RngAlgorithm::ChaCha, seed));
    let (mut interpreted, mut translated) = (guest(0), guest(1));
    let mut blocks = 0;
    for n in 0..programs {
        let program = r.program();
        for g in [&mut interpreted, &mut translated] {
            g.write(CODE, &[0x90; 0x200]);
            g.write(CODE, &program);
        }
        for state in 0..STATES {
            let mut gpr = [0; 16];
            gpr.iter_mut().for_each(|v| *v = r.value());
            gpr[gpr::RSP] = if r.one_in(16) { r.value() } else { STACK - 8 * r.below(16) };
            let flags = r.0.next_u64() & rflags::STATUS | rflags::FIXED1;
            let mut data = vec![0; DATA_SIZE];
            r.0.fill_bytes(&mut data);
            let wanted = run(&mut interpreted, gpr, flags, &data);
            let before = translated.vcpu.cpu().translator.translated;
            let got = run(&mut translated, gpr, flags, &data);
            blocks += translated.vcpu.cpu().translator.translated - before;
            if [&wanted, &got].iter().any(|end| end.exit.reason == ExitReason::PreemptionTimer) {
                // They got differently far, also in what they did to memory.
                (interpreted, translated) = (guest(0), guest(1));
                break;
            }
            assert!(
                wanted == got,
                "program {n}, state {state}: {program:02x?}\nfrom {gpr:x?} {flags:x}\n\
                 interpreted {:x?}\ntranslated  {:x?}",
                End { data: Vec::new(), stack: Vec::new(), ..wanted },
                End { data: Vec::new(), stack: Vec::new(), ..got },
            );
        }
    }
    assert!(blocks > programs, "only {blocks} blocks were translated");
}
