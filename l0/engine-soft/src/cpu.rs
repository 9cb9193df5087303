//! Architectural state of one vCPU while the engine runs it, and small accessors.
//!
//! Outside [`crate::vmentry`] nothing here knows of a VMCS; between VM entry and exit
//! this struct is the processor.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use engine::{Activity, Controls, DescriptorTable, ExitBus, FpuState, Msrs, Segment, VmExit};
use iced_x86::Register;
use memory::MachineMemory;
use x86_spec::controls::PrimaryControls;
use x86_spec::interruption::EventType;
use x86_spec::reg::{cr0, cr4, efer, rflags};
use x86_spec::segment::seg;
use x86_spec::{exception, exception::pf};

use crate::block::{Block, BlockCache, WrittenPages};
use crate::mmu::Mmu;
use crate::thunk::ThunkCache;
use crate::translate::Translator;

/// Slot of [`Cpu::regs`] that always holds zero (absent base or index).
pub const SLOT_ZERO: usize = 16;
/// Slot of [`Cpu::regs`] that holds RIP.
pub const SLOT_RIP: usize = 17;
/// Slot of [`Cpu::regs`] that holds the FS base.
pub const SLOT_FS: usize = 18;
/// Slot of [`Cpu::regs`] that holds the GS base.
pub const SLOT_GS: usize = 19;

/// Execution stopped before the current instruction completed; why is in
/// [`Cpu::reason`]. Only [`Cpu::raise`], [`Cpu::exit`] and their kin make one.
#[derive(Debug)]
#[must_use]
pub struct Stop(pub(crate) ());

/// Result of anything that may fault or exit.
pub type Exec<T = ()> = Result<T, Stop>;

/// An exception or other event on its way to delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Vector.
    pub vector: u8,
    /// Type.
    pub kind: EventType,
    /// Error code, if the event pushes one.
    pub error: Option<u32>,
    /// #PF: the faulting linear address (for CR2). #DB: bits to set in DR6.
    pub payload: u64,
}

impl Event {
    /// A hardware exception without an error code.
    pub const fn fault(vector: u8) -> Self {
        Self { vector, kind: EventType::HardwareException, error: None, payload: 0 }
    }
    /// A hardware exception with an error code.
    pub const fn fault_code(vector: u8, code: u32) -> Self {
        Self { vector, kind: EventType::HardwareException, error: Some(code), payload: 0 }
    }
}

/// Why execution stopped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// Nothing stopped.
    None,
    /// An exception is to be delivered (or to exit).
    Event(Event),
    /// A VM exit; RIP stays at the instruction.
    Exit(VmExit),
    /// The instruction must be executed again, alone (it writes to its own block).
    Reexecute,
}

/// Kind of memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write (or read-modify-write).
    Write,
    /// Instruction fetch.
    Fetch,
}

/// Instruction-set mode of the code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CodeSize {
    /// 16-bit code (real, virtual-8086, 16-bit protected).
    Bits16 = 0,
    /// 32-bit code.
    Bits32 = 1,
    /// 64-bit code.
    Bits64 = 2,
}

/// The processor. `repr(C)`: a translator will share the layout.
#[repr(C)]
pub struct Cpu {
    /// RAX … R15, then zero, RIP, FS base and GS base; see the `SLOT_` constants.
    ///
    /// RIP holds the address of the block's first instruction while a block runs; see
    /// [`Cpu::ip`].
    pub regs: [u64; 20],
    /// Status flags in LAHF form: bits 15:8 as LAHF puts them in AH (SF ZF 0 AF 0 PF 1 CF),
    /// bit 0 OF. Use [`Cpu::rflags`].
    pub flags: u16,
    /// Current privilege level.
    pub cpl: u8,
    /// Mode of the code segment.
    pub code_size: CodeSize,
    /// Key bits of blocks decoded in this mode.
    pub block_mode: u8,
    /// TLB context: address space in bits 11:2, privilege mode in bits 1:0.
    pub ctx: u64,
    /// Guest instructions executed, counted at block entry.
    pub icount: u64,
    /// RFLAGS without the status flags.
    pub rflags_other: u64,
    /// The memory-management unit: TLB and paging caches.
    pub mmu: Mmu,
    /// The block that runs.
    pub block: *const Block,
    /// Linear RIP (offset in CS) of the instruction that runs; valid inside out-of-line
    /// instructions ([`crate::decode`]) and after a stop.
    pub ip: u64,
    /// Why execution stopped last.
    pub reason: Reason,
    /// ES … TR with hidden parts. Write only through [`Cpu::set_segment`].
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// CR0; write through [`Cpu::set_cr0`].
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3; write through the MMU's functions.
    pub cr3: u64,
    /// CR4; write through [`Cpu::set_cr4`].
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// Address-range monitoring, while it is armed.
    pub monitor: Option<engine::Monitor>,
    /// PDPTEs of PAE paging.
    pub pdptes: [u64; 4],
    /// DR0–DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7; write through [`Cpu::set_dr7`].
    pub dr7: u64,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_SYSENTER_CS, _ESP, _EIP.
    pub sysenter: [u64; 3],
    /// IA32_PAT.
    pub pat: u64,
    /// Other MSRs.
    pub msrs: Msrs,
    /// x87 and vector state.
    pub fpu: Box<FpuState>,
    /// Activity state.
    pub activity: Activity,
    /// Interruptibility ([`engine::interruptibility`]).
    pub interruptibility: u32,
    /// Debug exceptions that wait for the instruction boundary ([`engine::pending_debug`]).
    pub pending_debug: u64,
    /// PML index (SDM Vol. 3C §25.4.2).
    pub pml_index: u16,
    /// The event whose delivery is in progress, for IDT-vectoring information and for
    /// double faults.
    pub delivering: Option<Event>,
    /// Instruction length of a software event in delivery.
    pub delivering_length: u32,
    /// Controls of the VMCS that runs.
    pub controls: Controls,
    /// TSC value at which the preemption timer fires, if it is on.
    pub timer_deadline: Option<u64>,
    /// Execute the next instruction alone (single step, interrupt shadow, own-code write).
    pub single: bool,
    /// Virtual interrupts and the APIC-access page.
    pub virtual_apic: crate::system::virtual_apic::VirtualApic,
    /// Where fields are in a shadow VMCS.
    pub shadow_layout: Arc<crate::system::shadow_vmcs::ShadowLayout>,
    /// VMREADs and VMWRITEs that did not exit.
    pub vmcs_accesses: engine::VmcsAccesses,
    /// What is remembered between instruction boundaries.
    pub boundary: crate::system::pending::Boundary,
    /// The performance-monitoring unit's registers, but for IA32_PERF_GLOBAL_CTRL.
    pub pmu: Box<engine::Pmu>,
    /// IA32_PERF_GLOBAL_CTRL.
    pub perf_global_ctrl: u64,
    /// What the performance counters count.
    pub counting: crate::system::pmu::Counting,
    /// Execute the next instruction alone although nothing else asks for it.
    pub force_single: bool,
    /// Only one instruction is to be executed ([`engine::Vcpu::emulate`]).
    pub one_shot: bool,
    /// Where accesses to unmapped memory and ports go instead of exiting.
    pub bus: Option<*mut dyn ExitBus>,
    /// Block that wants its exit `link_slot` linked to the next block, or null.
    pub link_from: *const Block,
    /// See `link_from`.
    pub link_slot: u8,
    /// RIP at which `link_from` started.
    pub link_start: u64,
    /// The thunk arena or block cache is full; the run loop starts it anew.
    pub code_full: bool,
    /// Pages with cached code that others wrote.
    pub written_pages: Arc<WrittenPages>,
    /// Invalidations asked for by others.
    pub requests: Arc<crate::Requests>,
    /// Decoded code.
    pub blocks: BlockCache,
    /// Blocks as host code.
    pub translator: Translator,
    /// Code generated for instructions that the host's own units execute.
    pub thunks: ThunkCache,
    /// Machine memory.
    pub memory: Arc<MachineMemory>,
    /// What other threads set.
    pub shared: Arc<Shared>,
}

// SAFETY: the raw pointers in `Cpu` (`block`, `bus`, those inside `mmu` and `blocks`) point into
// memory that the struct itself owns or holds an `Arc` to, or are valid only during one `enter`.
unsafe impl Send for Cpu {}

/// The part of a vCPU that other threads touch.
#[derive(Debug, Default)]
pub struct Shared {
    /// `icount` at which the run loop must look around; other threads store 0.
    pub limit: AtomicU64,
    /// Someone kicked.
    pub kicked: AtomicBool,
    /// Invalidations asked for by others wait.
    pub invalidate: AtomicBool,
    /// Where an inactive guest's thread waits for either.
    parking: Mutex<()>,
    /// The vCPU is in [`Self::wait`].
    waiting: AtomicBool,
    wake: Condvar,
}

impl Shared {
    /// Makes the run loop look at what was just stored, also from an inactive guest's wait.
    pub fn notify(&self) {
        self.limit.store(0, Ordering::SeqCst);
        // The waiter says that it waits before it looks for the last time, so one of the two sees the
        // other; most often nobody waits, and a system call is spared.
        if !self.waiting.load(Ordering::SeqCst) {
            return;
        }
        // With the lock held, the waiter has either not yet looked or waits.
        drop(self.parking.lock().unwrap_or_else(|e| e.into_inner()));
        self.wake.notify_all();
    }

    /// Waits until someone kicked or asked for an invalidation, at most for `timeout`.
    pub(crate) fn wait(&self, timeout: Option<Duration>) {
        let idle =
            |(): &mut ()| !self.kicked.load(Ordering::SeqCst) && !self.invalidate.load(Ordering::SeqCst);
        let guard = self.parking.lock().unwrap_or_else(|e| e.into_inner());
        self.waiting.store(true, Ordering::SeqCst);
        match timeout {
            Some(t) => drop(self.wake.wait_timeout_while(guard, t, idle)),
            None => drop(self.wake.wait_while(guard, idle)),
        }
        self.waiting.store(false, Ordering::SeqCst);
    }
}

impl Cpu {
    // ---- stops -------------------------------------------------------------------

    /// Stops with an event to deliver.
    #[cold]
    pub fn raise(&mut self, event: Event) -> Stop {
        self.reason = Reason::Event(event);
        Stop(())
    }
    /// Stops with a fault without error code.
    #[cold]
    pub fn fault(&mut self, vector: u8) -> Stop {
        self.raise(Event::fault(vector))
    }
    /// Stops with a fault with an error code.
    #[cold]
    pub fn fault_code(&mut self, vector: u8, code: u32) -> Stop {
        self.raise(Event::fault_code(vector, code))
    }
    /// #GP(code).
    #[cold]
    pub fn gp(&mut self, code: u32) -> Stop {
        self.fault_code(exception::GP, code)
    }
    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.fault(exception::UD)
    }
    /// #PF with `code` for the linear address `linear`.
    #[cold]
    pub fn page_fault(&mut self, linear: u64, code: u32) -> Stop {
        debug_assert!(code & !(pf::P | pf::W | pf::U | pf::RSVD | pf::I | pf::PK) == 0);
        self.raise(Event { payload: linear, ..Event::fault_code(exception::PF, code) })
    }
    /// Stops with a VM exit.
    #[cold]
    pub fn exit(&mut self, exit: VmExit) -> Stop {
        self.reason = Reason::Exit(exit);
        Stop(())
    }

    // ---- registers ----------------------------------------------------------------

    /// A general register.
    #[inline(always)]
    pub fn gpr(&self, index: usize) -> u64 {
        self.regs[index & 15]
    }
    /// Sets all 64 bits of a general register.
    #[inline(always)]
    pub fn set_gpr(&mut self, index: usize, value: u64) {
        self.regs[index & 15] = value;
    }
    /// RIP: inside out-of-line instructions that end a block, the address of the next
    /// instruction; assigning it is a jump.
    #[inline(always)]
    pub fn rip(&self) -> u64 {
        self.regs[SLOT_RIP]
    }
    /// Sets RIP.
    #[inline(always)]
    pub fn set_rip(&mut self, rip: u64) {
        self.regs[SLOT_RIP] = rip;
    }

    /// A general register by its iced name, zero-extended. Other registers give 0.
    pub fn reg(&self, r: Register) -> u64 {
        if r.is_gpr64() {
            self.gpr(r.number())
        } else if r.is_gpr32() {
            self.gpr(r.number()) as u32 as u64
        } else if r.is_gpr16() {
            self.gpr(r.number()) as u16 as u64
        } else if r.is_gpr8() {
            match r {
                Register::AH | Register::CH | Register::DH | Register::BH => {
                    self.gpr(r as usize - Register::AH as usize) >> 8 & 0xff
                }
                _ => self.gpr(gpr8_number(r)) & 0xff,
            }
        } else {
            0
        }
    }

    /// Sets a general register by its iced name: 32-bit writes zero the upper half,
    /// smaller ones keep the rest. Other registers are ignored.
    pub fn set_reg(&mut self, r: Register, value: u64) {
        if r.is_gpr64() {
            self.set_gpr(r.number(), value);
        } else if r.is_gpr32() {
            self.set_gpr(r.number(), value as u32 as u64);
        } else if r.is_gpr16() {
            let n = r.number();
            self.set_gpr(n, self.gpr(n) & !0xffff | value & 0xffff);
        } else if r.is_gpr8() {
            match r {
                Register::AH | Register::CH | Register::DH | Register::BH => {
                    let n = r as usize - Register::AH as usize;
                    self.set_gpr(n, self.gpr(n) & !0xff00 | (value & 0xff) << 8);
                }
                _ => {
                    let n = gpr8_number(r);
                    self.set_gpr(n, self.gpr(n) & !0xff | value & 0xff);
                }
            }
        }
    }

    /// RFLAGS.
    pub fn rflags(&self) -> u64 {
        let of = (self.flags as u64 & 1) << 11;
        self.rflags_other | (self.flags >> 8) as u64 & 0xd5 | of | rflags::FIXED1
    }
    /// Sets all of RFLAGS. The caller has decided which bits may change. Updates what
    /// depends on AC, TF and VM.
    pub fn set_rflags(&mut self, value: u64) {
        let old = self.rflags_other;
        let new = value & !(rflags::STATUS | rflags::FIXED1);
        self.set_status_flags(value);
        self.rflags_other = new;
        if (old ^ new) & (rflags::AC | rflags::VM) != 0 {
            self.update_mode();
        }
        // TF and RF make the next instruction run alone; IF opens the interrupt window. A kick
        // asks for a check itself.
        let window = !old & new & rflags::IF != 0
            && (self.virtual_apic.recognized
                || self.controls.primary.contains(PrimaryControls::INTERRUPT_WINDOW_EXITING));
        if window || (old | new) & (rflags::TF | rflags::RF) != 0 {
            self.request_event_check();
        }
    }
    /// Sets the six status flags from an RFLAGS image.
    pub fn set_status_flags(&mut self, value: u64) {
        self.flags = ((value as u16 & 0xd5) | 2) << 8 | (value >> 11) as u16 & 1;
    }
    /// Carry flag.
    pub fn cf(&self) -> bool {
        self.flags & 0x100 != 0
    }
    /// Whether DF is set.
    pub fn df(&self) -> bool {
        self.rflags_other & rflags::DF != 0
    }
    /// IOPL.
    pub fn iopl(&self) -> u8 {
        ((self.rflags_other & rflags::IOPL) >> 12) as u8
    }

    // ---- modes ----------------------------------------------------------------------

    /// Protected mode (CR0.PE).
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }
    /// Virtual-8086 mode.
    pub fn v8086(&self) -> bool {
        self.rflags_other & rflags::VM != 0
    }
    /// Real-address mode or virtual-8086 mode.
    pub fn real_or_v86(&self) -> bool {
        !self.protected() || self.v8086()
    }
    /// IA-32e mode (EFER.LMA): 64-bit or compatibility mode.
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }
    /// 64-bit mode.
    pub fn is_64(&self) -> bool {
        self.code_size == CodeSize::Bits64
    }
    /// Width in bytes of a stack push's pointer: 8, 4 or 2.
    pub fn stack_size(&self) -> u8 {
        if self.is_64() {
            8
        } else if self.segments[seg::SS].access.db() {
            4
        } else {
            2
        }
    }

    /// Writes a segment register with its hidden part (also LDTR and TR) and updates
    /// what is derived from it. Setting CS does not set CPL: see [`Cpu::set_cpl`].
    pub fn set_segment(&mut self, index: usize, s: Segment) {
        self.segments[index] = s;
        match index {
            seg::FS => self.regs[SLOT_FS] = s.base,
            seg::GS => self.regs[SLOT_GS] = s.base,
            _ => {}
        }
        self.update_mode();
    }
    /// Sets only the base of FS or GS (WRFSBASE, SWAPGS, MSR writes).
    pub fn set_segment_base(&mut self, index: usize, base: u64) {
        self.segments[index].base = base;
        match index {
            seg::FS => self.regs[SLOT_FS] = base,
            seg::GS => self.regs[SLOT_GS] = base,
            _ => {}
        }
    }
    /// Sets the current privilege level.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        self.update_mode();
    }
    /// Sets CR0 as given (checks were the caller's) and updates what depends on it. The
    /// caller flushes translations where the SDM asks for it.
    pub fn set_cr0(&mut self, value: u64) {
        self.cr0 = value;
        self.update_mode();
    }
    /// Sets CR4 as given (checks were the caller's) and updates what depends on it.
    pub fn set_cr4(&mut self, value: u64) {
        self.cr4 = value;
        self.update_mode();
    }
    /// Sets EFER as given (checks were the caller's) and updates what depends on it.
    pub fn set_efer(&mut self, value: u64) {
        self.efer = value;
        self.update_mode();
    }
    /// Sets DR7 and updates what depends on it.
    pub fn set_dr7(&mut self, value: u64) {
        self.dr7 = value;
        self.mmu_breakpoints_changed();
        self.request_event_check();
    }

    /// Recomputes code size, block key and TLB context from CS, SS, CPL, RFLAGS, CR0, CR4
    /// and EFER. Every change of those must end here.
    pub fn update_mode(&mut self) {
        let cs = self.segments[seg::CS].access;
        self.code_size = if self.long_mode() && cs.long() {
            CodeSize::Bits64
        } else if cs.db() && !self.real_or_v86() || cs.db() && !self.protected() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        self.block_mode = self.code_size as u8 | if self.segments[seg::SS].access.db() { 4 } else { 0 };
        self.ctx = self.ctx & !3 | self.privilege_mode();
        self.mmu_paging_mode_changed();
        if self.counting.by_privilege {
            self.privilege_changed();
        }
    }

    /// Bits 1:0 of the TLB context: how data accesses are checked.
    fn privilege_mode(&self) -> u64 {
        let ac = self.rflags_other & rflags::AC != 0;
        if self.cpl == 3 {
            if ac && self.cr0 & cr0::AM != 0 { PRIV_USER_ALIGN } else { PRIV_USER }
        } else if self.cr4 & cr4::SMAP != 0 && !ac {
            PRIV_SUPERVISOR
        } else {
            PRIV_SUPERVISOR_AC
        }
    }

    /// Makes the run loop look at events (interrupt windows, single step, timer) before
    /// the next block. To be called by whatever may have enabled an event.
    pub fn request_event_check(&mut self) {
        self.shared.limit.store(0, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Supervisor access with SMAP in force.
pub const PRIV_SUPERVISOR: u64 = 0;
/// User access.
pub const PRIV_USER: u64 = 1;
/// Supervisor access without SMAP (CR4.SMAP clear or EFLAGS.AC set).
pub const PRIV_SUPERVISOR_AC: u64 = 2;
/// User access with alignment checks: never served by the TLB's fast path.
pub const PRIV_USER_ALIGN: u64 = 3;

/// Encoding number of a byte register other than AH, CH, DH, BH.
pub fn gpr8_number(r: Register) -> usize {
    match r {
        Register::AL => 0,
        Register::CL => 1,
        Register::DL => 2,
        Register::BL => 3,
        _ => ((r as usize).wrapping_sub(Register::SPL as usize) + 4) & 15,
    }
}
