//! Executes one instruction on the host, with all registers loaded and stored, catching its
//! faults.

use std::io;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

use crate::layout::{BLOCK, CODE, DATA, INSTRUCTION, PAGE, READ_ONLY, STUB};
use crate::state::{Data, End, State};

/// What the stubs load and store.
#[repr(C, align(64))]
struct Block {
    gpr_in: [u64; 16],
    rflags_in: u64,
    host_rsp: u64,
    gpr_out: [u64; 16],
    rflags_out: u64,
    trap: u64,
    error: u64,
    address: u64,
    rip: u64,
    host_mxcsr: u64,
    target: [u8; 8],
    data_segment: u64,
    null_segment: u64,
    fx_in: Fx,
    fx_out: Fx,
    ymm_in: [[u64; 4]; 16],
    ymm_out: [[u64; 4]; 16],
}

#[repr(C, align(64))]
struct Fx([u8; 512]);

/// No trap happened.
const NO_TRAP: u64 = u64::MAX;

/// The host processor as an executor of single instructions. There is one at a time: it owns
/// fixed addresses and signal handlers.
pub struct Native {
    entry: extern "C" fn(),
    bits: u32,
    _only: MutexGuard<'static, ()>,
}

static ONLY: Mutex<()> = Mutex::new(());

const GPR: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
const PRESERVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

fn at(offset: usize) -> MemoryOperand {
    MemoryOperand::new(
        Register::None,
        Register::None,
        1,
        (BLOCK as usize + offset) as i64,
        4,
        false,
        Register::None,
    )
}

macro_rules! field {
    ($name:ident) => {
        at(std::mem::offset_of!(Block, $name))
    };
    ($name:ident, $index:expr, $size:expr) => {
        at(std::mem::offset_of!(Block, $name) + $index * $size)
    };
}

struct Assembler {
    encoder: Encoder,
    address: u64,
}

impl Assembler {
    fn new(address: u64) -> Self {
        Self { encoder: Encoder::new(64), address }
    }
    fn emit(&mut self, i: Result<Instruction, iced_x86::IcedError>) {
        self.address += self.encoder.encode(&i.unwrap(), self.address).unwrap() as u64;
    }
}

fn entry_code(bits: u32) -> Vec<u8> {
    let mut a = Assembler::new(STUB);
    for r in PRESERVED {
        a.emit(Instruction::with1(Code::Push_r64, r));
    }
    a.emit(Instruction::with2(Code::Mov_rm64_r64, field!(host_rsp), Register::RSP));
    a.emit(Instruction::with1(Code::Fxrstor64_m512byte, field!(fx_in)));
    for n in 0..16 {
        let r = Register::YMM0 + n as u32;
        a.emit(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, r, field!(ymm_in, n, 32)));
    }
    if bits == 32 {
        for r in [Register::DS, Register::ES] {
            a.emit(Instruction::with2(Code::Mov_Sreg_rm16, r, field!(data_segment)));
        }
    }
    a.emit(Instruction::with1(Code::Push_rm64, field!(rflags_in)));
    a.emit(Ok(Instruction::with(Code::Popfq)));
    for (n, r) in GPR.into_iter().enumerate() {
        a.emit(Instruction::with2(Code::Mov_r64_rm64, r, field!(gpr_in, n, 8)));
    }
    a.emit(if bits == 32 {
        Instruction::with1(Code::Jmp_m1632, field!(target))
    } else {
        Instruction::with_branch(Code::Jmp_rel32_64, INSTRUCTION)
    });
    a.encoder.take_buffer()
}

fn exit_code(start: u64) -> Vec<u8> {
    let mut a = Assembler::new(start);
    for (n, r) in GPR.into_iter().enumerate() {
        a.emit(Instruction::with2(Code::Mov_rm64_r64, field!(gpr_out, n, 8), r));
    }
    a.emit(Instruction::with2(Code::Mov_r64_rm64, Register::RSP, field!(host_rsp)));
    a.emit(Ok(Instruction::with(Code::Pushfq)));
    a.emit(Instruction::with1(Code::Pop_rm64, field!(rflags_out)));
    for r in [Register::DS, Register::ES] {
        a.emit(Instruction::with2(Code::Mov_Sreg_rm16, r, field!(null_segment)));
    }
    a.emit(Ok(Instruction::with(Code::Cld)));
    a.emit(Instruction::with1(Code::Fxsave64_m512byte, field!(fx_out)));
    for n in 0..16 {
        let r = Register::YMM0 + n as u32;
        a.emit(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, field!(ymm_out, n, 32), r));
    }
    a.emit(Ok(Instruction::with(Code::VEX_Vzeroupper)));
    a.emit(Ok(Instruction::with(Code::Fninit)));
    a.emit(Instruction::with1(Code::Ldmxcsr_m32, field!(host_mxcsr)));
    for r in PRESERVED.into_iter().rev() {
        a.emit(Instruction::with1(Code::Pop_r64, r));
    }
    a.emit(Ok(Instruction::with(Code::Retnq)));
    a.encoder.take_buffer()
}

/// Linux's selectors for 64- and 32-bit code and for data of user mode.
const CODE64: i64 = 0x33;
const CODE32: u8 = 0x23;
const USER_DATA: u64 = 0x2b;

/// Where the exit stub begins.
const EXIT: u64 = STUB + 0x800;

/// Notes the fault and goes on at the exit stub.
extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    let block = BLOCK as *mut Block;
    // SAFETY: the kernel passes a valid context; the block is mapped before handlers are set.
    unsafe {
        let g = &mut (*context).uc_mcontext.gregs;
        let rip = g[libc::REG_RIP as usize] as u64;
        if rip & !0xfff != CODE {
            // Not ours: let the default action take place.
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::signal(libc::SIGILL, libc::SIG_DFL);
            libc::signal(libc::SIGFPE, libc::SIG_DFL);
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            return;
        }
        (*block).trap = g[libc::REG_TRAPNO as usize] as u64;
        (*block).error = g[libc::REG_ERR as usize] as u64;
        (*block).address = g[libc::REG_CR2 as usize] as u64;
        (*block).rip = rip;
        g[libc::REG_RIP as usize] = EXIT as i64;
        let selectors = &mut g[libc::REG_CSGSFS as usize];
        *selectors = *selectors & !0xffff | CODE64;
    }
}

fn map(address: u64, pages: usize, protection: i32) -> io::Result<()> {
    // SAFETY: addresses below 4 GiB that nothing else uses; MAP_FIXED_NOREPLACE checks that.
    let p = unsafe {
        libc::mmap(
            address as *mut _,
            pages * PAGE,
            protection,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if p as u64 == address { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Drop for Native {
    fn drop(&mut self) {
        for (address, pages) in [(DATA, 2), (READ_ONLY, 1), (CODE, 2), (BLOCK, 2)] {
            // SAFETY: these were mapped by `new`, and nothing refers to them any more.
            unsafe { libc::munmap(address as *mut _, pages * PAGE) };
        }
    }
}

impl Native {
    /// Maps the fixed addresses and sets the signal handlers.
    pub fn new(bits: u32) -> io::Result<Self> {
        let only = ONLY.lock().unwrap_or_else(|e| e.into_inner());
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        map(DATA, 2, RW)?;
        map(READ_ONLY, 1, RW)?;
        map(CODE, 2, RW | libc::PROT_EXEC)?;
        map(BLOCK, 2, RW)?;
        const { assert!(std::mem::size_of::<Block>() <= 2 * PAGE) };
        let (entry, exit) = (entry_code(bits), exit_code(EXIT));
        assert!(entry.len() < 0x800 && exit.len() < 0x800);
        // SAFETY: the mappings were just made; a fresh alternate stack is never freed.
        unsafe {
            ptr::copy_nonoverlapping(entry.as_ptr(), STUB as *mut u8, entry.len());
            ptr::copy_nonoverlapping(exit.as_ptr(), EXIT as *mut u8, exit.len());
            let block = &mut *(BLOCK as *mut Block);
            block.host_mxcsr = 0x1f80;
            block.target[..4].copy_from_slice(&(INSTRUCTION as u32).to_le_bytes());
            block.target[4] = CODE32;
            block.data_segment = USER_DATA;
            libc::mprotect(READ_ONLY as *mut _, PAGE, libc::PROT_READ);
            let stack = Box::leak(vec![0u8; 1 << 18].into_boxed_slice());
            let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
            libc::sigaltstack(&stack, ptr::null_mut());
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
                libc::sigaction(signal, &action, ptr::null_mut());
            }
            Ok(Self {
                entry: std::mem::transmute::<usize, extern "C" fn()>(STUB as usize),
                bits,
                _only: only,
            })
        }
    }

    /// Puts the instruction in place; behind it, and at `target` if it is a branch, lies
    /// the way out.
    pub fn set_instruction(&mut self, bytes: &[u8]) {
        let mut code = [0xcc; 64];
        code[..bytes.len()].copy_from_slice(bytes);
        let out = if self.bits == 32 {
            let mut far = vec![0xea];
            far.extend_from_slice(&(EXIT as u32).to_le_bytes());
            far.extend_from_slice(&(CODE64 as u16).to_le_bytes());
            far
        } else {
            let mut a = Assembler::new(INSTRUCTION + bytes.len() as u64);
            a.emit(Instruction::with_branch(Code::Jmp_rel32_64, EXIT));
            a.encoder.take_buffer()
        };
        code[bytes.len()..bytes.len() + out.len()].copy_from_slice(&out);
        // SAFETY: the code page is mapped and nothing runs there now.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), INSTRUCTION as *mut u8, code.len()) };
    }

    /// Replaces the data pages.
    pub fn set_data(&mut self, data: &Data) {
        // SAFETY: the pages are mapped; no reference to them exists.
        unsafe {
            ptr::copy_nonoverlapping(data.as_ptr(), DATA as *mut u8, 2 * PAGE);
        }
    }

    /// Replaces the read-only page.
    pub fn set_read_only(&mut self, data: &Data) {
        // SAFETY: as in `set_data`; the page is writable in between.
        unsafe {
            libc::mprotect(READ_ONLY as *mut _, PAGE, libc::PROT_READ | libc::PROT_WRITE);
            ptr::copy_nonoverlapping(data.as_ptr().add(2 * PAGE), READ_ONLY as *mut u8, PAGE);
            libc::mprotect(READ_ONLY as *mut _, PAGE, libc::PROT_READ);
        }
    }

    /// Copies the writable data pages out.
    pub fn data(&self, out: &mut Data) {
        // SAFETY: as in `set_data`.
        unsafe { ptr::copy_nonoverlapping(DATA as *const u8, out.as_mut_ptr(), 2 * PAGE) };
    }

    /// Runs the instruction.
    pub fn run(&mut self, state: &mut State, length: usize) -> End {
        // SAFETY: the block is mapped, and only this function and the stubs use it while no
        // signal is handled.
        let block = unsafe { &mut *(BLOCK as *mut Block) };
        block.gpr_in = state.gpr;
        block.rflags_in = state.rflags | 0x202;
        block.fx_in.0[..160].copy_from_slice(&state.x87);
        block.fx_in.0[24..28].copy_from_slice(&state.mxcsr.to_le_bytes());
        block.fx_in.0[28..32].fill(0);
        block.ymm_in = state.vectors;
        block.trap = NO_TRAP;
        (self.entry)();
        // SAFETY: as above; volatile because the stubs wrote behind the compiler's back.
        let block = unsafe { &*std::hint::black_box(BLOCK as *const Block) };
        state.gpr = block.gpr_out;
        if self.bits == 32 {
            // The upper halves are undefined (SDM Vol. 1 §3.4.1.1).
            state.gpr.iter_mut().for_each(|v| *v = *v as u32 as u64);
            state.gpr[8..].fill(0);
        }
        state.rflags = block.rflags_out & crate::FLAGS;
        state.x87.copy_from_slice(&block.fx_out.0[..160]);
        state.x87[24..32].fill(0);
        state.mxcsr = u32::from_le_bytes(block.fx_out.0[24..28].try_into().unwrap());
        state.vectors = block.ymm_out;
        match block.trap {
            NO_TRAP => End::Next(length as u64),
            14 => End::Fault(14, block.error as u32, block.address),
            t => End::Fault(t as u8, 0, 0),
        }
    }
}
