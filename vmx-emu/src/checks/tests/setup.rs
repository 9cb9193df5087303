//! A VMCS that passes all checks, and ways to change it.

use std::collections::BTreeMap;

use memory::L1Gpa;
use x86_spec::caps::{AllowedControls, VmxCapabilities};
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::{cr0, cr4, efer, rflags};

use super::super::{Context, MsrBits, Report, run};
use crate::Field::*;
use crate::fields::GUEST_SEGMENTS;
use crate::vmcs12::REVISION;
use crate::{Capabilities, Field, L1Cpu, Vmcs12};

/// MAXPHYADDR of L1.
pub const PHYSICAL_BITS: u8 = 40;
/// The first address beyond it.
pub const BEYOND: u64 = 1 << PHYSICAL_BITS;
/// Not canonical with 48 bits.
pub const NOT_CANONICAL: u64 = 1 << 47;
/// The virtual-APIC page.
pub const APIC_PAGE: u64 = 0x5000;
/// Another VMCS region, with the revision identifier and no shadow indicator.
pub const OTHER_VMCS: u64 = 0x6000;
/// The current VMCS region.
pub const CURRENT_VMCS: u64 = 0x7000;
/// The type field of PAT entries: the value after RESET (SDM Vol. 3A §12.12.4).
pub const PAT: u64 = 0x0007_0406_0007_0406;

/// Everything that a context is made of.
pub struct Setup {
    pub vmcs: Vmcs12,
    pub caps: Capabilities,
    pub l1_long_mode: bool,
    /// Bytes of memory that are not ones.
    memory: BTreeMap<u64, u8>,
}

fn capabilities() -> Capabilities {
    let all = AllowedControls { must_be_one: 0, may_be_one: u32::MAX };
    let engine = VmxCapabilities {
        pin: all,
        primary: all,
        secondary: all,
        exit: all,
        entry: all,
        ept_vpid: u64::MAX,
        misc: u64::MAX,
        preemption_timer_shift: 5,
    };
    Capabilities::new(
        &engine,
        &L1Cpu {
            cr4: 0x37_27ff,
            physical_bits: PHYSICAL_BITS,
            withheld_pin: P::empty(),
            withheld: S::empty(),
        },
    )
}

impl Setup {
    /// A 64-bit Linux guest in its kernel under a 64-bit host, with EPT and VPID.
    pub fn base() -> Self {
        let mut s = Self {
            vmcs: Vmcs12::default(),
            caps: capabilities(),
            l1_long_mode: true,
            memory: BTreeMap::new(),
        };
        s.base_controls().base_host().base_guest();
        s.store(APIC_PAGE + 0x80, &[0; 4]);
        s.store(OTHER_VMCS, &REVISION.to_le_bytes());
        s
    }

    fn base_controls(&mut self) -> &mut Self {
        let pin = P::EXTERNAL_INTERRUPT_EXITING | P::NMI_EXITING | P::VIRTUAL_NMIS;
        let primary = C::HLT_EXITING | C::USE_TPR_SHADOW | C::USE_MSR_BITMAPS | C::SECONDARY_CONTROLS;
        let secondary = S::ENABLE_EPT | S::ENABLE_VPID | S::ENABLE_RDTSCP;
        let exit = X::SAVE_DEBUG_CONTROLS
            | X::HOST_ADDRESS_SPACE_SIZE
            | X::ACK_INTERRUPT_ON_EXIT
            | X::SAVE_IA32_PAT
            | X::LOAD_IA32_PAT
            | X::SAVE_IA32_EFER
            | X::LOAD_IA32_EFER;
        let entry = N::LOAD_DEBUG_CONTROLS | N::IA32E_MODE_GUEST | N::LOAD_IA32_PAT | N::LOAD_IA32_EFER;
        // The bits that are reserved and 1 by the TRUE MSRs (SDM Vol. 3D appendix A.3–A.5).
        self.set(PinControls, 0x16)
            .on(pin)
            .set(PrimaryControls, 0x0400_6172)
            .on(primary)
            .on(secondary)
            .set(ExitControls, 0x0003_6dfb)
            .on(exit)
            .set(EntryControls, 0x11fb)
            .on(entry)
            .set(MsrBitmap, 0x3000)
            .set(VirtualApicAddress, APIC_PAGE)
            .set(Eptp, 0x10_0000 | 6 | 3 << 3 | 1 << 6)
            .set(Vpid, 1)
    }

    fn base_host(&mut self) -> &mut Self {
        self.set(HostCr0, cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG)
            .set(HostCr3, 0x20_0000)
            .set(HostCr4, cr4::PAE | cr4::PGE | cr4::VMXE | cr4::OSFXSR)
            .set(HostCsSelector, 0x10)
            .set(HostSsSelector, 0)
            .set(HostTrSelector, 0x40)
            .set(HostFsBase, 0x7fff_f7d8_0740)
            .set(HostGsBase, 0xffff_8881_3bc0_0000)
            .set(HostTrBase, 0xffff_fe00_0000_3000)
            .set(HostGdtrBase, 0xffff_fe00_0000_1000)
            .set(HostIdtrBase, 0xffff_fe00_0000_0000)
            .set(HostSysenterEsp, 0xffff_fe00_0000_3000)
            .set(HostSysenterEip, 0xffff_ffff_81a0_1000)
            .set(HostRip, 0xffff_ffff_8105_0000)
            .set(HostRsp, 0xffff_c900_0000_4000)
            .set(HostPat, PAT)
            .set(HostEfer, efer::SCE | efer::LME | efer::LMA | efer::NXE)
    }

    fn base_guest(&mut self) -> &mut Self {
        self.set(GuestCr0, cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG)
            .set(GuestCr3, 0x260_a000)
            .set(GuestCr4, cr4::PAE | cr4::PGE | cr4::VMXE | cr4::OSFXSR)
            .set(GuestDr7, 0x400)
            .set(GuestEfer, efer::SCE | efer::LME | efer::LMA | efer::NXE)
            .set(GuestPat, PAT)
            .set(GuestRip, 0xffff_ffff_8100_0000)
            .set(GuestRsp, 0xffff_ffff_8200_3f00)
            .set(GuestRflags, rflags::FIXED1 | rflags::IF)
            .set(GuestSysenterEsp, 0xffff_fe00_0000_3000)
            .set(GuestSysenterEip, 0xffff_ffff_81a0_1000)
            .set(GuestGdtrBase, 0xffff_fe00_0000_1000)
            .set(GuestGdtrLimit, 0x7f)
            .set(GuestIdtrBase, 0xffff_fe00_0000_0000)
            .set(GuestIdtrLimit, 0xfff)
            .set(LinkPointer, u64::MAX)
            // ES, DS, FS and GS are null, as in a 64-bit kernel.
            .segment("ES", 0, 0, 0, 0x1_0000)
            .segment("CS", 0x10, 0, u32::MAX, 0xa09b)
            .segment("SS", 0x18, 0, u32::MAX, 0xc093)
            .segment("DS", 0, 0, 0, 0x1_0000)
            .segment("FS", 0, 0, 0, 0x1_0000)
            .segment("GS", 0, 0xffff_8880_3fc0_0000, 0, 0x1_0000)
            .segment("LDTR", 0, 0, 0, 0x1_0000)
            .segment("TR", 0x40, 0xffff_fe00_0000_3000, 0x206f, 0x8b)
    }

    /// Performs the checks.
    pub fn run(&self) -> Report {
        let memory = |at: L1Gpa, buf: &mut [u8]| {
            for (i, b) in buf.iter_mut().enumerate() {
                *b = self.memory.get(&at.0.wrapping_add(i as u64)).copied().unwrap_or(0xff);
            }
        };
        run(&Context {
            vmcs: &self.vmcs,
            current_vmcs: L1Gpa(CURRENT_VMCS),
            caps: &self.caps,
            msr_bits: MsrBits { efer: efer::DEFINED, debugctl: 3, perf_global_ctrl: 0x7_0000_000f },
            linear_bits: 48,
            l1_long_mode: self.l1_long_mode,
            memory: &memory,
        })
    }

    pub fn set(&mut self, field: Field, value: u64) -> &mut Self {
        self.vmcs.set(field, value);
        self
    }
    /// Sets bits of a field.
    pub fn or(&mut self, field: Field, bits: u64) -> &mut Self {
        self.set(field, self.vmcs.get(field) | bits)
    }
    /// Clears bits of a field.
    pub fn clear(&mut self, field: Field, bits: u64) -> &mut Self {
        self.set(field, self.vmcs.get(field) & !bits)
    }
    /// Sets controls.
    pub fn on<T: Controls>(&mut self, controls: T) -> &mut Self {
        self.or(T::FIELD, controls.mask())
    }
    /// Clears controls.
    pub fn off<T: Controls>(&mut self, controls: T) -> &mut Self {
        self.clear(T::FIELD, controls.mask())
    }
    /// Puts bytes into L1's memory.
    pub fn store(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        self.memory.extend((at..).zip(bytes.iter().copied()));
        self
    }
    /// Sets a guest segment register.
    pub fn segment(&mut self, name: &str, selector: u64, base: u64, limit: u32, access: u64) -> &mut Self {
        let index = ["ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR"].iter().position(|n| *n == name);
        let f = GUEST_SEGMENTS[index.unwrap()];
        self.set(f.selector, selector).set(f.base, base).set(f.limit, limit as u64).set(f.access, access)
    }
    /// Injects an event.
    pub fn inject(&mut self, ty: EventType, vector: u8, error_code: bool) -> &mut Self {
        self.set(EntryInterruptionInfo, InterruptionInfo::new(vector, ty, error_code).0 as u64)
            .set(EntryInstructionLength, 2)
    }
    /// Makes the guest a 32-bit one in protected mode, with PAE paging and flat segments.
    pub fn legacy(&mut self) -> &mut Self {
        self.off(N::IA32E_MODE_GUEST)
            .clear(GuestEfer, efer::LME | efer::LMA)
            .set(GuestRip, 0xc100_0000)
            .segment("CS", 0x10, 0, u32::MAX, 0xc09b)
    }
    /// Makes the guest a virtual-8086 one.
    pub fn virtual_8086(&mut self) -> &mut Self {
        self.legacy().or(GuestRflags, rflags::VM).set(GuestRip, 0x100);
        for (i, name) in ["ES", "CS", "SS", "DS", "FS", "GS"].iter().enumerate() {
            let selector = 0x1000 + i as u64;
            self.segment(name, selector, selector << 4, 0xffff, 0xf3);
        }
        self
    }
    /// Makes the guest an unrestricted one.
    pub fn unrestricted(&mut self) -> &mut Self {
        self.on(S::UNRESTRICTED_GUEST)
    }
    /// Makes the guest one in real-address mode.
    pub fn real(&mut self) -> &mut Self {
        self.unrestricted().legacy().clear(GuestCr0, cr0::PE | cr0::PG).set(GuestRip, 0x100);
        for name in ["ES", "SS", "DS", "FS", "GS"] {
            self.segment(name, 0x1000, 0x1_0000, 0xffff, 0x93);
        }
        self.segment("CS", 0x1000, 0x1_0000, 0xffff, 0x9b)
    }
    /// Makes L1 a 32-bit hypervisor with a 32-bit guest.
    pub fn legacy_l1(&mut self) -> &mut Self {
        self.l1_long_mode = false;
        self.legacy()
            .off(X::HOST_ADDRESS_SPACE_SIZE)
            .set(HostEfer, 0)
            .set(HostSsSelector, 0x18)
            .set(HostRip, 0xc105_0000)
    }
}

/// Sets of controls, which know their field.
pub trait Controls {
    const FIELD: Field;
    fn mask(self) -> u64;
}

macro_rules! controls {
    ($($ty:ty => $field:ident;)*) => {
        $(impl Controls for $ty {
            const FIELD: Field = $field;
            fn mask(self) -> u64 { self.bits() as u64 }
        })*
    };
}

controls! {
    P => PinControls;
    C => PrimaryControls;
    S => SecondaryControls;
    X => ExitControls;
    N => EntryControls;
}
