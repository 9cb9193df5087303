//! Guest state in KVM's format and in the VMCS's.
//!
//! What KVM has is kept as KVM gave it; only what L0 changed is put in, so that fields which the VMCS
//! does not show keep their values and unchanged state is not loaded again.

use engine::{DescriptorTable, EngineVmcs, GuestRegs, GuestState, Segment, interruptibility};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::gpr;
use x86_spec::segment::{AccessRights, seg};

/// Parts of the state that differ from what KVM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dirty {
    pub regs: bool,
    pub sregs: bool,
    pub events: bool,
}

/// The state that KVM has, as far as exits bring it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KvmState {
    /// KVM decides what becomes of events ([`crate::host_vmx`]): they stay as it has them.
    pub keeps_events: bool,
    /// An exception that L0 raises is a pending one.
    pub pending_exceptions: bool,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub events: kvm_vcpu_events,
    /// `sregs` as the VMCS shows them, which is quick to compare. `None` as long as nobody did.
    shown: Option<System>,
}

/// The system registers in the VMCS's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct System {
    segments: [Segment; 8],
    gdtr: DescriptorTable,
    idtr: DescriptorTable,
    control: [u64; 5],
}

impl System {
    fn of(g: &GuestState, regs: &GuestRegs) -> Self {
        let (segments, gdtr, idtr) = (g.segments, g.gdtr, g.idtr);
        Self { segments, gdtr, idtr, control: control(g, regs) }
    }

    fn is_that_of(&self, g: &GuestState, regs: &GuestRegs) -> bool {
        self.control == control(g, regs)
            && self.segments == g.segments
            && self.gdtr == g.gdtr
            && self.idtr == g.idtr
    }
}

fn control(g: &GuestState, regs: &GuestRegs) -> [u64; 5] {
    [g.cr0, g.cr3, g.cr4, g.efer, regs.cr2]
}

/// The events that L0 sets: interrupt shadow and pending NMIs besides what is injected.
const EVENT_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;

pub(crate) fn to_segment(s: &kvm_segment) -> Segment {
    let bit = |v: u8, mask: u32| if v != 0 { mask } else { 0 };
    let access = u32::from(s.type_ & 15)
        | bit(s.s, AccessRights::S)
        | u32::from(s.dpl & 3) << 5
        | bit(s.present, AccessRights::P)
        | bit(s.avl, AccessRights::AVL)
        | bit(s.l, AccessRights::L)
        | bit(s.db, AccessRights::DB)
        | bit(s.g, AccessRights::G)
        | bit(s.unusable, AccessRights::UNUSABLE);
    Segment { base: s.base, limit: s.limit, access: AccessRights(access), selector: s.selector }
}

pub(crate) fn from_segment(s: &Segment) -> kvm_segment {
    let a = s.access;
    let bit = |mask: u32| u8::from(a.0 & mask != 0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: a.ty(),
        present: bit(AccessRights::P),
        dpl: a.dpl(),
        db: bit(AccessRights::DB),
        s: bit(AccessRights::S),
        l: bit(AccessRights::L),
        g: bit(AccessRights::G),
        avl: bit(AccessRights::AVL),
        unusable: bit(AccessRights::UNUSABLE),
        padding: 0,
    }
}

/// Whether L0 changed none of the general registers, RIP and RFLAGS.
fn is_same(r: &kvm_regs, g: &GuestState, regs: &GuestRegs) -> bool {
    let [rax, rcx, rdx, rbx, _, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = regs.gpr;
    let low = r.rax ^ rax | r.rcx ^ rcx | r.rdx ^ rdx | r.rbx ^ rbx | r.rsp ^ g.rsp | r.rbp ^ rbp;
    let middle = r.rsi ^ rsi | r.rdi ^ rdi | r.r8 ^ r8 | r.r9 ^ r9 | r.r10 ^ r10 | r.r11 ^ r11;
    let high = r.r12 ^ r12 | r.r13 ^ r13 | r.r14 ^ r14 | r.r15 ^ r15;
    low | middle | high | r.rip ^ g.rip | r.rflags ^ g.rflags == 0
}

/// General registers in encoding order, RSP's slot included.
fn general(r: &mut kvm_regs) -> [&mut u64; 16] {
    [
        &mut r.rax, &mut r.rcx, &mut r.rdx, &mut r.rbx, &mut r.rsp, &mut r.rbp, &mut r.rsi, &mut r.rdi,
        &mut r.r8, &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15,
    ]
}

/// Segment registers in the VMCS's order.
fn segments(s: &mut kvm_sregs) -> [(usize, &mut kvm_segment); 8] {
    [
        (seg::ES, &mut s.es),
        (seg::CS, &mut s.cs),
        (seg::SS, &mut s.ss),
        (seg::DS, &mut s.ds),
        (seg::FS, &mut s.fs),
        (seg::GS, &mut s.gs),
        (seg::LDTR, &mut s.ldt),
        (seg::TR, &mut s.tr),
    ]
}

fn to_table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit.into() }
}

/// Writes `value` and says so, if it differs.
fn put<T: PartialEq>(slot: &mut T, value: T, dirty: &mut bool) {
    if *slot != value {
        *slot = value;
        *dirty = true;
    }
}

impl KvmState {
    /// What KVM gave.
    pub fn new(regs: kvm_regs, sregs: kvm_sregs, events: kvm_vcpu_events) -> Self {
        let mut state =
            Self { regs, sregs, events, shown: None, keeps_events: false, pending_exceptions: false };
        state.normalise();
        state
    }

    /// To be called with what KVM gave: leaves out what only one direction has.
    pub fn normalise(&mut self) {
        if !self.keeps_events {
            self.events.flags = EVENT_FLAGS;
        }
        // KVM would queue this interrupt a second time; `events` has it.
        self.sregs.interrupt_bitmap = [0; 4];
    }

    /// Shows the state in VMCS and registers, but for the system registers.
    pub fn show(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) {
        let g = &mut vmcs.guest;
        for (i, r) in general(&mut self.regs).into_iter().enumerate() {
            if i == gpr::RSP {
                g.rsp = *r;
            } else {
                regs.gpr[i] = *r;
            }
        }
        (g.rip, g.rflags) = (self.regs.rip, self.regs.rflags);
        g.interruptibility = self.interruptibility();
    }

    /// Shows the system registers.
    pub fn show_system(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) {
        let g = &mut vmcs.guest;
        for (i, s) in segments(&mut self.sregs) {
            g.segments[i] = to_segment(s);
        }
        let s = &self.sregs;
        (g.gdtr, g.idtr) = (to_table(&s.gdt), to_table(&s.idt));
        (g.cr0, g.cr3, g.cr4, g.efer) = (s.cr0, s.cr3, s.cr4, s.efer);
        regs.cr2 = s.cr2;
        self.shown = Some(System::of(&vmcs.guest, regs));
    }

    fn interruptibility(&self) -> u32 {
        let shadow = u32::from(self.events.interrupt.shadow);
        let bit = |set: bool, mask: u32| if set { mask } else { 0 };
        bit(shadow & KVM_X86_SHADOW_INT_STI != 0, interruptibility::STI)
            | bit(shadow & KVM_X86_SHADOW_INT_MOV_SS != 0, interruptibility::MOV_SS)
            | bit(self.events.nmi.masked != 0, interruptibility::NMI)
    }

    /// Takes over what L0 changed, and the event that VMCS injects. Most exits change nothing or little, so
    /// this comes to a few comparisons.
    pub fn take(&mut self, vmcs: &EngineVmcs, regs: &GuestRegs) -> Dirty {
        let mut dirty = Dirty::default();
        let g = &vmcs.guest;
        if !is_same(&self.regs, g, regs) {
            dirty.regs = true;
            for (i, r) in general(&mut self.regs).into_iter().enumerate() {
                *r = if i == gpr::RSP { g.rsp } else { regs.gpr[i] };
            }
            (self.regs.rip, self.regs.rflags) = (g.rip, g.rflags);
        }
        if !self.shown.as_ref().is_some_and(|s| s.is_that_of(g, regs)) {
            dirty.sregs = self.take_system(g, regs);
            self.shown = Some(System::of(g, regs));
        }
        dirty.events = if self.keeps_events { self.take_exception(vmcs) } else { self.take_events(vmcs) };
        // Loading the registers drops an exception that KVM has queued.
        let queued = self.events.exception.injected != 0 || self.events.exception.pending != 0;
        dirty.events |= dirty.regs && queued;
        dirty
    }

    fn take_system(&mut self, g: &GuestState, regs: &GuestRegs) -> bool {
        let mut dirty = false;
        for (i, s) in segments(&mut self.sregs) {
            if to_segment(s) != g.segments[i] {
                *s = from_segment(&g.segments[i]);
                dirty = true;
            }
        }
        let s = &mut self.sregs;
        for (t, want) in [(&mut s.gdt, g.gdtr), (&mut s.idt, g.idtr)] {
            put(&mut t.base, want.base, &mut dirty);
            // A limit has 16 bits (SDM Vol. 3C §27.3.1.3).
            put(&mut t.limit, want.limit as u16, &mut dirty);
        }
        let registers = [&mut s.cr0, &mut s.cr3, &mut s.cr4, &mut s.efer, &mut s.cr2];
        for (r, want) in registers.into_iter().zip(control(g, regs)) {
            put(r, want, &mut dirty);
        }
        dirty
    }

    /// Takes over an exception that VMCS injects, and nothing else.
    fn take_exception(&mut self, vmcs: &EngineVmcs) -> bool {
        let info = vmcs.controls.entry_interruption;
        if !info.is_valid() || info.event_type() != EventType::HardwareException {
            return false;
        }
        let e = &mut self.events.exception;
        (e.nr, e.has_error_code) = (info.vector(), info.has_error_code().into());
        e.error_code = vmcs.controls.entry_error_code;
        (e.injected, e.pending) = (u8::from(!self.pending_exceptions), u8::from(self.pending_exceptions));
        self.events.exception_has_payload = 0;
        true
    }

    fn take_events(&mut self, vmcs: &EngineVmcs) -> bool {
        let shadow = vmcs.guest.interruptibility;
        let c = &vmcs.controls;
        let info = c.entry_interruption;
        if !info.is_valid() && !self.has_event() && shadow == self.interruptibility() {
            return false;
        }
        let before = self.events;
        let e = &mut self.events;
        let bit = |mask: u32, flag: u32| if shadow & mask != 0 { flag as u8 } else { 0 };
        e.interrupt.shadow = bit(interruptibility::STI, KVM_X86_SHADOW_INT_STI)
            | bit(interruptibility::MOV_SS, KVM_X86_SHADOW_INT_MOV_SS);
        e.nmi.masked = u8::from(shadow & interruptibility::NMI != 0);
        let is = |ty: EventType| info.is_valid() && info.event_type() == ty;
        let soft = is(EventType::SoftwareInterrupt);
        let interrupt = is(EventType::External) || soft;
        let exception = is(EventType::HardwareException)
            || is(EventType::SoftwareException)
            || is(EventType::PrivilegedSoftwareException);
        if interrupt {
            (e.interrupt.nr, e.interrupt.soft) = (info.vector(), soft.into());
        }
        e.interrupt.injected = interrupt.into();
        if exception {
            (e.exception.nr, e.exception.has_error_code) = (info.vector(), info.has_error_code().into());
            e.exception.error_code = c.entry_error_code;
        }
        e.exception.injected = exception.into();
        e.exception.pending = 0;
        e.nmi.injected = is(EventType::Nmi).into();
        before != *e
    }

    /// Whether KVM has an event that it has not delivered.
    fn has_event(&self) -> bool {
        let e = &self.events;
        e.exception.injected | e.exception.pending | e.interrupt.injected | e.nmi.injected != 0
    }

    /// The event whose delivery KVM has not finished, with its error code: IDT-vectoring
    /// information (SDM Vol. 3C §25.9.3).
    pub fn interrupted_event(&self) -> (InterruptionInfo, u32) {
        let e = &self.events;
        if self.keeps_events || !self.has_event() {
            (InterruptionInfo::NONE, 0)
        } else if e.exception.injected != 0 {
            let has_code = e.exception.has_error_code != 0;
            let info = InterruptionInfo::new(e.exception.nr, EventType::HardwareException, has_code);
            (info, if has_code { e.exception.error_code } else { 0 })
        } else if e.nmi.injected != 0 {
            (InterruptionInfo::new(x86_spec::exception::NMI, EventType::Nmi, false), 0)
        } else if e.interrupt.injected != 0 {
            let ty = if e.interrupt.soft != 0 { EventType::SoftwareInterrupt } else { EventType::External };
            (InterruptionInfo::new(e.interrupt.nr, ty, false), 0)
        } else {
            (InterruptionInfo::NONE, 0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_round_trip() {
        // Busy 64-bit TSS, flat 64-bit code, unusable LDTR: SDM Vol. 3C table 25-2.
        for access in [0x8b, 0xa09b, 0xc093, 0x1_0000, 0x93] {
            let s = Segment { base: 0x1234, limit: 0xfffff, access: AccessRights(access), selector: 8 };
            assert_eq!(to_segment(&from_segment(&s)), s, "{access:#x}");
        }
        let cs = from_segment(&Segment { access: AccessRights(0xa09b), ..Segment::default() });
        assert_eq!((cs.type_, cs.s, cs.l, cs.db, cs.g, cs.present), (11, 1, 1, 0, 1, 1));
    }

    #[test]
    fn only_what_changed_is_dirty() {
        let (mut vmcs, mut regs) = (EngineVmcs::default(), GuestRegs::reset());
        let mut state = KvmState::default();
        assert!(state.take(&vmcs, &regs).sregs, "the state after RESET differs from zeros");
        assert_eq!(state.take(&vmcs, &regs), Dirty::default());
        regs.gpr[gpr::RAX] = 7;
        assert_eq!(state.take(&vmcs, &regs), Dirty { regs: true, ..Dirty::default() });
        vmcs.guest.cr3 = 0x1000;
        assert_eq!(state.take(&vmcs, &regs), Dirty { sregs: true, ..Dirty::default() });
        let (mut shown, mut shown_regs) = (EngineVmcs::default(), GuestRegs::reset());
        state.show(&mut shown, &mut shown_regs);
        state.show_system(&mut shown, &mut shown_regs);
        assert_eq!(shown.guest, vmcs.guest);
        assert_eq!(shown_regs.gpr, regs.gpr);
    }

    #[test]
    fn an_event_goes_in_and_comes_back_while_it_is_not_delivered() {
        let (mut vmcs, regs) = (EngineVmcs::default(), GuestRegs::reset());
        let mut state = KvmState::default();
        state.take(&vmcs, &regs);
        for (info, code) in [
            (InterruptionInfo::new(0x40, EventType::External, false), 0),
            (InterruptionInfo::new(14, EventType::HardwareException, true), 2),
            (InterruptionInfo::new(2, EventType::Nmi, false), 0),
            (InterruptionInfo::NONE, 0),
        ] {
            (vmcs.controls.entry_interruption, vmcs.controls.entry_error_code) = (info, code);
            assert!(state.take(&vmcs, &regs).events);
            assert_eq!(state.interrupted_event(), (info, code));
            assert!(!state.take(&vmcs, &regs).events, "the same again is no change");
        }
    }

    #[test]
    fn blocking_is_in_the_interruptibility_state() {
        let (mut vmcs, mut regs) = (EngineVmcs::default(), GuestRegs::reset());
        let mut state = KvmState::default();
        state.events.interrupt.shadow = KVM_X86_SHADOW_INT_STI as u8;
        state.events.nmi.masked = 1;
        state.show(&mut vmcs, &mut regs);
        assert_eq!(vmcs.guest.interruptibility, interruptibility::STI | interruptibility::NMI);
        vmcs.guest.interruptibility = interruptibility::MOV_SS;
        assert!(state.take(&vmcs, &regs).events);
        let e = &state.events;
        assert_eq!((e.interrupt.shadow, e.nmi.masked), (KVM_X86_SHADOW_INT_MOV_SS as u8, 0));
    }
}
