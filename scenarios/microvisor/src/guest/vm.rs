//! A virtual machine with one VMCS: valid by default, changed by the cases, entered.

use core::arch::naked_asm;
use core::sync::atomic::{AtomicBool, Ordering};

use super::ept::Ept;
use super::fields::*;
use super::suite::{Outcome, Stop, fail, skip};
use super::vmx::{self, Caps, VmxError};
use super::{cpu, evmcs, memory, trap};

/// General registers of L2, which the world switch saves and loads.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Regs {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RBP.
    pub rbp: u64,
    /// R8 to R15.
    pub r: [u64; 8],
}

/// What ends `vm_switch`: a VM exit, RFLAGS of a failed instruction with bit 63 set, or all
/// ones after an exception.
const EXITED: u64 = 0;
const FAULTED: u64 = !0;

/// Enters L2 with VMLAUNCH (`launch` not 0) or VMRESUME. With `write_rsp` 0, HOST_RSP is as the
/// last call left it, and the caller's stack pointer must be the same; 1 has it written by VMWRITE, any other
/// value is the address of an enlightened VMCS to write it to.
#[unsafe(naked)]
unsafe extern "C" fn vm_switch(regs: *mut Regs, launch: u64, write_rsp: u64) -> u64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "test rdx, rdx",
        "jz 2f",
        "cmp rdx, 1",
        "jne 8f",
        "mov eax, 0x6c14",
        "vmwrite rax, rsp",
        "jmp 2f",
        "8: mov [rdx + {host_rsp}], rsp",
        "and dword ptr [rdx + {clean_fields}], {not_clean}",
        "2: lea rax, [rip + 5f]",
        "mov [rip + {fixup}], rax",
        "test rsi, rsi",
        "mov rax, [rdi]",
        "mov rbx, [rdi + 8]",
        "mov rcx, [rdi + 16]",
        "mov rdx, [rdi + 24]",
        "mov rsi, [rdi + 32]",
        "mov rbp, [rdi + 48]",
        "mov r8, [rdi + 56]",
        "mov r9, [rdi + 64]",
        "mov r10, [rdi + 72]",
        "mov r11, [rdi + 80]",
        "mov r12, [rdi + 88]",
        "mov r13, [rdi + 96]",
        "mov r14, [rdi + 104]",
        "mov r15, [rdi + 112]",
        "mov rdi, [rdi + 40]",
        "jnz 3f",
        "vmresume",
        "jmp 4f",
        "3: vmlaunch",
        "4: pushfq",
        "pop rax",
        "bts rax, 63",
        "jmp 7f",
        "5: mov rax, -1",
        "jmp 7f",
        ".global vm_exit_landing",
        "vm_exit_landing:",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax",
        "mov [rdi + 8], rbx",
        "mov [rdi + 16], rcx",
        "mov [rdi + 24], rdx",
        "mov [rdi + 32], rsi",
        "pop qword ptr [rdi + 40]",
        "mov [rdi + 48], rbp",
        "mov [rdi + 56], r8",
        "mov [rdi + 64], r9",
        "mov [rdi + 72], r10",
        "mov [rdi + 80], r11",
        "mov [rdi + 88], r12",
        "mov [rdi + 96], r13",
        "mov [rdi + 104], r14",
        "mov [rdi + 112], r15",
        "xor eax, eax",
        "7: mov qword ptr [rip + {fixup}], 0",
        "pop rdi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        fixup = sym trap::FIXUP,
        host_rsp = const evmcs::HOST_RSP_OFFSET,
        clean_fields = const evmcs::CLEAN_FIELDS,
        not_clean = const !evmcs::HOST_RSP_CLEAN as i32,
    )
}

unsafe extern "C" {
    static vm_exit_landing: u8;
}

/// RIP of the hypervisor at VM exits.
pub fn landing() -> u64 {
    &raw const vm_exit_landing as u64
}

/// A VM exit: its information fields and L2's place.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exit {
    /// The exit reason with its flags.
    pub reason: u32,
    /// The exit qualification.
    pub qualification: u64,
    /// The VM-exit interruption information.
    pub info: u32,
    /// The VM-exit interruption error code.
    pub code: u32,
    /// The IDT-vectoring information.
    pub idt_info: u32,
    /// The IDT-vectoring error code.
    pub idt_code: u32,
    /// The VM-exit instruction length.
    pub len: u32,
    /// The VM-exit instruction information.
    pub instruction: u32,
    /// The guest-linear address.
    pub linear: u64,
    /// The guest-physical address.
    pub physical: u64,
    /// L2's RIP.
    pub rip: u64,
}

/// Machines get no EPT, as if the processor did not offer it.
pub static WITHOUT_EPT: AtomicBool = AtomicBool::new(false);

/// A virtual machine.
pub struct Vm {
    /// What the processor offers.
    pub caps: Caps,
    /// Its general registers.
    pub regs: Regs,
    /// The VMCS region.
    pub vmcs: u64,
    /// Where its code starts.
    pub code: u64,
    /// The page below its stack's top.
    pub stack: u64,
    /// Its EPT, if the processor offers EPT.
    pub ept: Option<Ept>,
    /// Whether VMRESUME is due.
    pub launched: bool,
    /// A scratch page, identity-mapped, for L2's data.
    pub data: u64,
}

/// Machine code for a guest, as lines of assembly; the value is its address.
macro_rules! code {
    ($($line:expr),* $(,)?) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn guest_code() {
            core::arch::naked_asm!($($line),*)
        }
        guest_code as *const () as u64
    }};
}
pub(crate) use code;

/// Segment access rights: not usable.
pub const UNUSABLE: u64 = 1 << 16;
/// 64-bit code, accessed.
pub const CODE64: u64 = 0xa09b;
/// 32-bit code, accessed.
pub const CODE32: u64 = 0xc09b;
/// 16-bit code, accessed.
pub const CODE16: u64 = 0x009b;
/// Writable data, accessed, 32-bit.
pub const DATA: u64 = 0xc093;
/// Writable data, accessed, 16-bit.
pub const DATA16: u64 = 0x0093;

impl Vm {
    /// A machine that starts in 64-bit mode at `code`, with the identity-mapped page tables of the
    /// hypervisor, and with EPT if that is offered.
    pub fn new(caps: &Caps, code: u64) -> Result<Self, Stop> {
        let vmcs = memory::page();
        memory::write(vmcs, if evmcs::wanted() { evmcs::VERSION } else { caps.revision() });
        let stack = memory::page();
        let data = memory::page();
        let mut vm =
            Self { caps: *caps, regs: Regs::default(), vmcs, code, stack, ept: None, launched: false, data };
        vm.load()?;
        vm.controls()?;
        vm.host()?;
        vm.guest()?;
        trap::clear_l2_event();
        vm.invalidate();
        Ok(vm)
    }
    /// Drops all translations: pages are used again by the next machine, with the same EPTP.
    pub fn invalidate(&self) {
        if self.caps.ept_vpid >> 20 & 1 != 0 {
            let _ = vmx::invept(2, 0);
        }
        if self.caps.ept_vpid >> 32 & 1 != 0 {
            let _ = vmx::invvpid(2, 0, 0);
        }
    }
    fn load(&mut self) -> Outcome {
        ok("VMCLEAR of a new VMCS", vmx::vmclear(self.vmcs))?;
        self.make_current()
    }
    /// Makes the VMCS current again.
    pub fn make_current(&self) -> Outcome {
        if evmcs::wanted() {
            evmcs::select(self.vmcs);
            return Ok(());
        }
        ok("VMPTRLD", vmx::vmptrld(self.vmcs))
    }
    /// What VMPTRST gives while this machine's VMCS is the one in use.
    pub fn current_pointer(&self) -> u64 {
        if evmcs::wanted() { !0 } else { self.vmcs }
    }
    fn controls(&mut self) -> Outcome {
        let c = self.caps;
        let secondary = c.primary.can(primary::SECONDARY);
        self.set(PIN, c.pin.one.into())?;
        self.set(PRIMARY, (c.primary.one | if secondary { primary::SECONDARY } else { 0 }).into())?;
        self.set(EXIT_CTL, (c.exit.one | exit::HOST_64).into())?;
        self.set(ENTRY_CTL, (c.entry.one | entry::IA32E).into())?;
        for field in [EXCEPTIONS, PF_MASK, PF_MATCH, CR3_COUNT] {
            self.set(field, 0)?;
        }
        for field in [EXIT_STORE_COUNT, EXIT_LOAD_COUNT, ENTRY_LOAD_COUNT, ENTRY_INFO, ENTRY_CODE, ENTRY_LEN]
        {
            self.set(field, 0)?;
        }
        for field in [CR0_MASK, CR4_MASK, CR0_SHADOW, CR4_SHADOW, TSC_OFFSET] {
            self.set(field, 0)?;
        }
        if secondary {
            self.set(SECONDARY, c.secondary.one.into())?;
        }
        if c.secondary.can(secondary::EPT) && !WITHOUT_EPT.load(Ordering::Relaxed) {
            let ept = Ept::identity();
            self.ept = Some(ept);
            self.or(SECONDARY, secondary::EPT)?;
            self.set(EPTP, ept.eptp())?;
        }
        Ok(())
    }
    fn host(&mut self) -> Outcome {
        for (field, value) in [
            (HOST_CS, 8),
            (HOST_SS, 0x10),
            (HOST_DS, 0x10),
            (HOST_ES, 0x10),
            (HOST_FS, 0),
            (HOST_GS, 0),
            (HOST_TR, trap::L1_TR.into()),
            (HOST_CR0, cpu::cr0()),
            (HOST_CR3, cpu::cr3()),
            (HOST_CR4, cpu::cr4() | self.caps.cr4_fixed[0]),
            (HOST_FS_BASE, cpu::msr(cpu::MSR_FS_BASE)),
            (HOST_GS_BASE, cpu::msr(cpu::MSR_GS_BASE)),
            (HOST_TR_BASE, trap::tss_base()),
            (HOST_GDTR, trap::gdt_base()),
            (HOST_IDTR, trap::idt_base()),
            (HOST_SYSENTER_CS, 0),
            (HOST_SYSENTER_ESP, 0),
            (HOST_SYSENTER_EIP, 0),
            (HOST_RIP, landing()),
        ] {
            self.set(field, value)?;
        }
        Ok(())
    }
    fn guest(&mut self) -> Outcome {
        for (field, value) in [
            (GUEST_CR0, cpu::cr0()),
            (GUEST_CR3, cpu::cr3()),
            (GUEST_CR4, cpu::cr4() | self.caps.cr4_fixed[0]),
            (GUEST_DR7, 0x400),
            (GUEST_RSP, self.stack + 4096),
            (GUEST_RIP, self.code),
            (GUEST_RFLAGS, 2),
            (LDTR_SEL, 0),
            (LDTR_BASE, 0),
            (LDTR_LIMIT, 0),
            (LDTR_AR, UNUSABLE),
            (TR_SEL, trap::L2_TR.into()),
            (TR_BASE, trap::l2_tss_base()),
            (TR_LIMIT, 103),
            (TR_AR, 0x8b),
            (GDTR_BASE, trap::gdt_base()),
            (GDTR_LIMIT, 127),
            (IDTR_BASE, trap::l2_idt_base()),
            (IDTR_LIMIT, 0xfff),
            (GUEST_DEBUGCTL, 0),
            (GUEST_SYSENTER_CS, 0),
            (GUEST_SYSENTER_ESP, 0),
            (GUEST_SYSENTER_EIP, 0),
            (ACTIVITY, 0),
            (INTERRUPTIBILITY, 0),
            (PENDING_DEBUG, 0),
            (LINK, !0),
        ] {
            self.set(field, value)?;
        }
        self.segments([8, 0x10], CODE64, DATA)
    }
    /// Sets CS and the data segments: selectors of code and data, access rights, flat.
    pub fn segments(&self, [code, data]: [u16; 2], code_ar: u64, data_ar: u64) -> Outcome {
        for i in 0..6 {
            let (selector, ar) = if i == 1 { (code, code_ar) } else { (data, data_ar) };
            // Byte granularity: 64 KiB.
            let limit = if ar & 0x8000 == 0 { 0xffff } else { 0xffff_ffff };
            self.set(ES_SEL + 2 * i, selector.into())?;
            self.set(ES_BASE + 2 * i, 0)?;
            self.set(ES_LIMIT + 2 * i, limit)?;
            self.set(ES_AR + 2 * i, ar)?;
        }
        Ok(())
    }
    /// Makes L2 start in 32-bit protected mode without paging, or, without unrestricted guest,
    /// skips the case.
    pub fn protected32(&mut self) -> Outcome {
        self.need_secondary(secondary::UNRESTRICTED)?;
        self.and(ENTRY_CTL, !entry::IA32E)?;
        self.set(GUEST_CR0, cpu::cr0() & !(1 << 31))?;
        self.segments([0x18, 0x10], CODE32, DATA)
    }
    /// Makes L2 start in real-address mode at `code`, which is copied to the start of the segment at
    /// `base`.
    pub fn real_mode(&mut self, base: u64, len: usize) -> Outcome {
        self.need_secondary(secondary::UNRESTRICTED)?;
        memory::copy(base, self.code, len);
        self.and(ENTRY_CTL, !entry::IA32E)?;
        self.set(GUEST_CR0, cpu::cr0() & !(1 << 31 | 1))?;
        self.set(GUEST_CR4, cpu::cr4() & self.caps.cr4_fixed[0])?;
        let selector = (base >> 4) as u16;
        self.segments([selector, selector], CODE16, DATA16)?;
        for i in 0..6 {
            self.set(ES_BASE + 2 * i, base)?;
        }
        self.set(GUEST_RIP, 0)?;
        self.set(GUEST_RSP, 0x1000)?;
        self.set(TR_LIMIT, 0xffff)?;
        self.set(IDTR_BASE, 0)?;
        self.set(IDTR_LIMIT, 0x3ff)
    }

    /// Reads a field.
    pub fn get(&self, field: u32) -> Result<u64, Stop> {
        value("VMREAD", field, vmx::vmread(field))
    }
    /// Writes a field.
    pub fn set(&self, field: u32, v: u64) -> Outcome {
        value("VMWRITE", field, vmx::vmwrite(field, v))
    }
    /// Sets bits of a 32-bit field.
    pub fn or(&self, field: u32, bits: u32) -> Outcome {
        self.set(field, self.get(field)? | u64::from(bits))
    }
    /// Keeps the bits `mask` of a 32-bit field.
    pub fn and(&self, field: u32, mask: u32) -> Outcome {
        self.set(field, self.get(field)? & u64::from(mask))
    }
    /// Sets pin-based controls, or skips the case.
    pub fn need_pin(&self, bits: u32) -> Outcome {
        self.need(PIN, self.caps.pin, bits)
    }
    /// Sets primary controls, or skips the case.
    pub fn need_primary(&self, bits: u32) -> Outcome {
        self.need(PRIMARY, self.caps.primary, bits)
    }
    /// Sets secondary controls, or skips the case.
    pub fn need_secondary(&self, bits: u32) -> Outcome {
        self.need(SECONDARY, self.caps.secondary, bits)
    }
    /// Sets exit controls, or skips the case.
    pub fn need_exit(&self, bits: u32) -> Outcome {
        self.need(EXIT_CTL, self.caps.exit, bits)
    }
    /// Sets entry controls, or skips the case.
    pub fn need_entry(&self, bits: u32) -> Outcome {
        self.need(ENTRY_CTL, self.caps.entry, bits)
    }
    fn need(&self, field: u32, allowed: vmx::Allowed, bits: u32) -> Outcome {
        if !allowed.can(bits) {
            return skip("control not offered");
        }
        self.or(field, bits)
    }
    /// The EPT, or skips the case.
    pub fn need_ept(&self) -> Result<Ept, Stop> {
        self.ept.ok_or(Stop::Skip("L2 has no EPT"))
    }

    /// Enters L2; the error is that of the instruction.
    pub fn enter(&mut self) -> Result<Exit, VmxError> {
        unsafe { (&raw mut trap::TRAP.vector).write_volatile(trap::NONE) };
        let ended = unsafe {
            vm_switch(&raw mut self.regs, u64::from(!self.launched), evmcs::current().unwrap_or(1))
        };
        match ended {
            EXITED => {}
            FAULTED => {
                return Err(trap::last().map_or(VmxError::Flags(FAULTED), VmxError::Fault));
            }
            flags => {
                return Err(vmx::outcome(flags).err().unwrap_or(VmxError::Flags(flags)));
            }
        }
        let get = |field| vmx::vmread(field).unwrap_or(0xbad_bad);
        let e = Exit {
            reason: get(REASON) as u32,
            qualification: get(QUALIFICATION),
            info: get(INTR_INFO) as u32,
            code: get(INTR_CODE) as u32,
            idt_info: get(IDT_INFO) as u32,
            idt_code: get(IDT_CODE) as u32,
            len: get(INSTR_LEN) as u32,
            instruction: get(INSTR_INFO) as u32,
            linear: get(GUEST_LINEAR),
            physical: get(GUEST_PHYS),
            rip: get(GUEST_RIP),
        };
        super::coverage::exit(e.reason);
        if e.reason >> 31 == 0 {
            self.launched = true;
        }
        Ok(e)
    }
    /// Enters L2; a VM entry that fails fails the case.
    pub fn run(&mut self) -> Result<Exit, Stop> {
        match self.enter() {
            Ok(e) if e.reason >> 31 != 0 => fail!(
                "VM entry failed with exit reason {:#x}, qualification {:#x}",
                e.reason,
                e.qualification
            ),
            Ok(e) => Ok(e),
            Err(error) => fail!("VM entry failed: {error:x?}"),
        }
    }
    /// Enters L2 and expects an exit with this reason.
    pub fn expect(&mut self, reason: u32) -> Result<Exit, Stop> {
        let e = self.run()?;
        if e.reason != reason {
            fail!(
                "expected exit reason {reason}, got {} (qualification {:#x}, rip {:#x} = code + {:#x}, interruption {:#x} {:#x}, gpa {:#x}, event in L2 {:x})",
                e.reason,
                e.qualification,
                e.rip,
                e.rip.wrapping_sub(self.code),
                e.info,
                e.code,
                e.physical,
                trap::l2_event().vector
            )
        }
        Ok(e)
    }
    /// Moves L2's RIP behind the instruction that caused the exit.
    pub fn skip_instruction(&mut self, e: &Exit) -> Outcome {
        self.set(GUEST_RIP, e.rip.wrapping_add(e.len.into()))
    }
    /// Enters L2 and expects its closing VMCALL, not one of its event handlers.
    pub fn finish(&mut self) -> Result<Exit, Stop> {
        let e = self.expect(reason::VMCALL)?;
        if e.rip == trap::l2_event_rip() {
            let event = trap::l2_event();
            fail!(
                "unexpected event {} in L2: code {:#x}, rip {:#x} = code + {:#x}, cr2 {:#x}",
                event.vector,
                event.code,
                event.rip,
                event.rip.wrapping_sub(self.code),
                event.cr2
            )
        }
        Ok(e)
    }
    /// Enters L2 and expects that its handler for `vector` runs; returns what it recorded.
    pub fn expect_event(&mut self, vector: u8) -> Result<trap::Record, Stop> {
        trap::clear_l2_event();
        let e = self.expect(reason::VMCALL)?;
        let event = trap::l2_event();
        if e.rip != trap::l2_event_rip() {
            fail!(
                "expected event {vector} in L2, got a VMCALL at code + {:#x}",
                e.rip.wrapping_sub(self.code)
            )
        }
        if event.vector != vector.into() {
            fail!("expected event {vector} in L2, got {} (code {:#x})", event.vector, event.code)
        }
        Ok(event)
    }
}

/// Turns the failure of a VMX instruction into one of the case.
pub fn ok<T>(what: &'static str, result: vmx::Vmx<T>) -> Result<T, Stop> {
    match result {
        Ok(v) => Ok(v),
        Err(error) => fail!("{what}: expected success, got {error:x?}"),
    }
}

fn value<T>(what: &'static str, field: u32, result: vmx::Vmx<T>) -> Result<T, Stop> {
    match result {
        Ok(v) => Ok(v),
        Err(VmxError::Valid(12)) if evmcs::current().is_some() => {
            Err(Stop::Skip("the enlightened VMCS has no such field"))
        }
        Err(error) => fail!("{what} of field {field:#x}: expected success, got {error:x?}"),
    }
}

impl Vm {
    /// One bare round: VMRESUME to the next exit, without reading fields.
    ///
    /// # Safety
    /// The machine has been launched, and `HOST_RSP` is written by the first round.
    pub unsafe fn resume_raw(&mut self, first: bool) -> bool {
        let write_rsp = if first { evmcs::current().unwrap_or(1) } else { 0 };
        unsafe { vm_switch(&raw mut self.regs, 0, write_rsp) == EXITED }
    }
}
