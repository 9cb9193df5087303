//! Merge: nobody's wish is lost, nobody's ban is lifted.

use std::sync::Arc;

use engine::{Controls, EngineVmcs};
use memory::{L1Gpa, L1Ram, MachineAddr, MachineMemory, RamLayout};
use proptest::prelude::*;
use x86_spec::caps::VmxCapabilities;
use x86_spec::controls::{PinbasedControls as P, PrimaryControls as C, SecondaryControls as S};

use super::bitmaps::msr_bit;
use super::provenance::Provenance;
use super::*;
use crate::capabilities::tests::{full, full_engine};
use crate::physical::L1Physical;

/// L1's RAM is the first MiB of the machine; L0's pages are above.
pub(crate) const RAM: u64 = 1 << 20;
const PAGES: Pages = Pages {
    io_bitmap_a: MachineAddr(RAM),
    io_bitmap_b: MachineAddr(RAM + 0x1000),
    msr_bitmap: MachineAddr(RAM + 0x2000),
    nowhere: MachineAddr(RAM + 0x3000),
};
const L0_IO_A: MachineAddr = MachineAddr(RAM + 0x4000);
const L0_IO_B: MachineAddr = MachineAddr(RAM + 0x5000);
const L0_MSR: MachineAddr = MachineAddr(RAM + 0x6000);
const L1_IO_A: u64 = 0x1000;
const L1_IO_B: u64 = 0x2000;
const L1_MSR: u64 = 0x3000;
const SPACE: L2Space = L2Space { eptp02: 0x5_501e, vpid02: 7 };

pub(crate) fn machine() -> (Arc<MachineMemory>, L1Ram) {
    let memory = Arc::new(MachineMemory::new(2 * RAM).unwrap());
    let ram = L1Ram::new(memory.clone(), RamLayout::new(RAM)).unwrap();
    (memory, ram)
}

struct Bench {
    memory: Arc<MachineMemory>,
    ram: L1Ram,
    vmcs01: EngineVmcs,
    vmcs12: Vmcs12,
    engine: VmxCapabilities,
    caps: Capabilities,
    msr_bitmaps: bitmaps::MsrBitmaps,
}

impl Bench {
    fn new(primary01: C, primary12: C) -> Self {
        let (memory, ram) = machine();
        let mut vmcs01 = EngineVmcs::default();
        let c = &mut vmcs01.controls;
        (c.io_bitmap_a, c.io_bitmap_b, c.msr_bitmap) = (L0_IO_A, L0_IO_B, L0_MSR);
        c.primary = primary01;
        c.secondary = S::ENABLE_EPT | S::ENABLE_VPID;
        let mut vmcs12 = Vmcs12::default();
        for (f, v) in [
            (Field::IoBitmapA, L1_IO_A),
            (Field::IoBitmapB, L1_IO_B),
            (Field::MsrBitmap, L1_MSR),
            (Field::PrimaryControls, u64::from(primary12.bits())),
            (Field::TscMultiplier, tsc::UNIT),
        ] {
            vmcs12.set(f, v);
        }
        let msr_bitmaps = bitmaps::MsrBitmaps::default();
        Self { memory, ram, vmcs01, vmcs12, engine: full_engine(), caps: full(), msr_bitmaps }
    }

    fn merge(&self) -> Merged {
        let l0 = L0 {
            vmcs01: &self.vmcs01,
            engine: &self.engine,
            caps: &self.caps,
            windows: C::empty(),
            deadline: None,
            pages: PAGES,
            msr_bitmaps: &self.msr_bitmaps,
            memory: &self.memory,
        };
        merge(&l0, &self.vmcs12, &self.ram, SPACE, None).unwrap()
    }

    fn bit(&self, page: u64, n: u64) -> bool {
        let mut b = [0];
        self.memory.read(MachineAddr(page + n / 8), &mut b).unwrap();
        b[0] & 1 << (n % 8) != 0
    }
}

/// What a processor does under some controls (SDM Vol. 3C §26.1.3), reading the bitmaps in
/// the memory of `bench`.
struct Processor<'a> {
    bench: &'a Bench,
    pin: P,
    primary: C,
    secondary: S,
    io: [u64; 2],
    msr: u64,
    exceptions: u32,
    filter: PageFaultFilter,
    cr0: CrMask,
    cr4: CrMask,
    targets: Vec<u64>,
    xss: u64,
}

impl<'a> Processor<'a> {
    fn engine(bench: &'a Bench, c: &Controls) -> Self {
        Self {
            bench,
            pin: c.pin,
            primary: c.primary,
            secondary: c.secondary,
            io: [c.io_bitmap_a.0, c.io_bitmap_b.0],
            msr: c.msr_bitmap.0,
            exceptions: c.exception_bitmap,
            filter: PageFaultFilter {
                bit: c.exception_bitmap & 1 << 14 != 0,
                mask: c.pfec_mask,
                matching: c.pfec_match,
            },
            cr0: CrMask { mask: c.cr0_mask, shadow: c.cr0_shadow },
            cr4: CrMask { mask: c.cr4_mask, shadow: c.cr4_shadow },
            targets: c.cr3_targets[..c.cr3_target_count.min(4) as usize].to_vec(),
            xss: c.xss_exit_bitmap,
        }
    }

    fn vmcs12(bench: &'a Bench) -> Self {
        let v = &bench.vmcs12;
        Self {
            bench,
            pin: P::from_bits_truncate(v.get32(Field::PinControls)),
            primary: primary12(v),
            secondary: secondary12(v),
            io: [L1_IO_A, L1_IO_B],
            msr: L1_MSR,
            exceptions: v.get32(Field::ExceptionBitmap),
            filter: PageFaultFilter::of(v),
            cr0: CrMask { mask: v.get(Field::Cr0Mask), shadow: v.get(Field::Cr0Shadow) },
            cr4: CrMask { mask: v.get(Field::Cr4Mask), shadow: v.get(Field::Cr4Shadow) },
            targets: CR3_TARGETS[..v.get(Field::Cr3TargetCount) as usize].iter().map(|f| v.get(*f)).collect(),
            xss: v.get(Field::XssExitBitmap),
        }
    }

    fn io_exits(&self, port: u16) -> bool {
        if self.primary.contains(C::USE_IO_BITMAPS) {
            self.bench.bit(self.io[usize::from(port >= 0x8000)], u64::from(port & 0x7fff))
        } else {
            self.primary.contains(C::UNCOND_IO_EXITING)
        }
    }

    fn msr_exits(&self, msr: u32, write: bool) -> bool {
        !self.primary.contains(C::USE_MSR_BITMAPS)
            || msr_bit(msr, write).is_none_or(|n| self.bench.bit(self.msr, n))
    }

    fn exception_exits(&self, vector: u8, code: u32) -> bool {
        if vector == 14 { self.filter.exits(code) } else { self.exceptions & 1 << vector != 0 }
    }

    fn cr3_load_exits(&self, value: u64) -> bool {
        self.primary.contains(C::CR3_LOAD_EXITING) && !self.targets.contains(&value)
    }
}

/// Controls whose 1-setting makes something exit, with no more to it.
const EXITING: C = C::HLT_EXITING
    .union(C::INVLPG_EXITING)
    .union(C::MWAIT_EXITING)
    .union(C::RDPMC_EXITING)
    .union(C::RDTSC_EXITING)
    .union(C::CR3_STORE_EXITING)
    .union(C::MOV_DR_EXITING)
    .union(C::MONITOR_TRAP_FLAG)
    .union(C::MONITOR_EXITING)
    .union(C::PAUSE_EXITING);
const EXITING2: S = S::DTABLE_EXITING
    .union(S::WBINVD_EXITING)
    .union(S::PAUSE_LOOP_EXITING)
    .union(S::RDRAND_EXITING)
    .union(S::RDSEED_EXITING);

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever exits under VMCS01's or VMCS12's controls exits under VMCS02's, and L2 has no
    /// more than both give it.
    #[test]
    fn l2_never_does_what_l0_or_l1_forbids(
        p01 in any::<[u32; 3]>(), p12 in any::<[u32; 3]>(),
        exc in any::<[u32; 2]>(), pf in any::<[[u8; 2]; 2]>(),
        crs in any::<[u64; 7]>(), targets in any::<[u64; 4]>(), count in 0..5u64,
        bits in prop::collection::vec((0..6usize, 0..0x8000u64), 0..300),
        ports in prop::collection::vec(any::<u16>(), 1..20),
        msrs in prop::collection::vec(prop_oneof![0..0x2000u32, 0x800..0x900u32, 0xc000_0000..0xc000_2000u32, any::<u32>()], 1..20),
        events in prop::collection::vec((0..32u8, 0..0x40u32), 1..20),
        values in prop::collection::vec(any::<u64>(), 1..20), xss: [u64; 2], tsc: [u64; 2],
    ) {
        let mut b = Bench::new(C::from_bits_truncate(p01[1]), C::from_bits_truncate(p12[1]));
        let c = &mut b.vmcs01.controls;
        c.pin = P::from_bits_truncate(p01[0]);
        c.secondary = S::from_bits_truncate(p01[2]);
        c.primary.remove(C::USE_TPR_SHADOW);
        c.exception_bitmap = exc[0];
        (c.pfec_mask, c.pfec_match) = (pf[0][0].into(), pf[0][1].into());
        (c.cr0_mask, c.cr4_mask, c.xss_exit_bitmap) = (crs[0], crs[1], xss[0]);
        (c.tsc_offset, c.tsc_multiplier) = (tsc[0], tsc::UNIT);
        for (f, v) in [
            (Field::PinControls, u64::from(p12[0] & b.caps.pin.may_be_one)),
            (Field::SecondaryControls, u64::from(p12[2] & b.caps.secondary.may_be_one)),
            (Field::ExceptionBitmap, exc[1].into()),
            (Field::PageFaultErrorCodeMask, pf[1][0].into()),
            (Field::PageFaultErrorCodeMatch, pf[1][1].into()),
            (Field::Cr0Mask, crs[2]), (Field::Cr0Shadow, crs[3]), (Field::GuestCr0, crs[4]),
            (Field::Cr4Mask, crs[5]), (Field::Cr4Shadow, crs[6]), (Field::GuestCr4, crs[4] >> 3),
            (Field::Cr3TargetCount, count), (Field::XssExitBitmap, xss[1]), (Field::TscOffset, tsc[1]),
        ] {
            b.vmcs12.set(f, v);
        }
        for (f, v) in CR3_TARGETS.iter().zip(targets) {
            b.vmcs12.set(*f, v);
        }
        // Chance alone would hardly ask for what a bit stands for.
        let (mut ports, mut msrs) = (ports, msrs);
        for (page, n) in bits {
            match page % 3 {
                2 => msrs.push(n as u32 & 0x1fff | if n & 0x2000 != 0 { 0xc000_0000 } else { 0 }),
                half => ports.push(n as u16 | (half as u16) << 15),
            }
            let page = [L1_IO_A, L1_IO_B, L1_MSR, L0_IO_A.0, L0_IO_B.0, L0_MSR.0][page];
            let mut byte = [0];
            b.memory.read(MachineAddr(page + n / 8), &mut byte).unwrap();
            b.memory.write(MachineAddr(page + n / 8), &[byte[0] | 1 << (n % 8)]).unwrap();
        }
        let m = b.merge();
        let p02 = Processor::engine(&b, &m.controls);
        let (l0, l1) = (Processor::engine(&b, &b.vmcs01.controls), Processor::vmcs12(&b));

        let either = (l0.primary | l1.primary) & EXITING;
        prop_assert!(p02.primary.contains(either));
        // The windows of VMCS01 are for L1's events.
        let windows = C::INTERRUPT_WINDOW_EXITING | C::NMI_WINDOW_EXITING;
        prop_assert_eq!(p02.primary & windows, l1.primary & windows);
        prop_assert!(p02.secondary.contains((l0.secondary | l1.secondary) & EXITING2));
        prop_assert!(p02.pin.contains((l0.pin | l1.pin) & (P::EXTERNAL_INTERRUPT_EXITING | P::NMI_EXITING)));
        prop_assert_eq!(xss[0] | xss[1], p02.xss);
        // Gifts.
        for s in [S::ENABLE_RDTSCP, S::ENABLE_INVPCID, S::ENABLE_XSAVES_XRSTORS, S::UNRESTRICTED_GUEST] {
            prop_assert_eq!(p02.secondary.contains(s), l0.secondary.contains(s) && l1.secondary.contains(s));
        }
        prop_assert_eq!(m.controls.vm_functions, 0);
        prop_assert_eq!((m.controls.eptp, m.controls.vpid), (SPACE.eptp02, SPACE.vpid02));
        // Neither L0's nor L1's TSC offset is lost, and none counts that is not in use.
        let used = |p: &Processor<'_>, n: usize| {
            if p.primary.contains(C::USE_TSC_OFFSETTING) { tsc[n] } else { 0 }
        };
        let seen = if p02.primary.contains(C::USE_TSC_OFFSETTING) { m.controls.tsc_offset } else { 0 };
        prop_assert_eq!(seen, used(&l0, 0).wrapping_add(used(&l1, 1)));
        for port in ports {
            prop_assert_eq!(p02.io_exits(port), l0.io_exits(port) || l1.io_exits(port), "port {:#x}", port);
        }
        let virtualized = bitmaps::X2apicVirtualization::of(&b.vmcs12);
        for msr in msrs {
            for write in [false, true] {
                let l0_guards = l0.msr_exits(msr, write)
                    && !(virtualized.covers(msr, write) && p02.primary.contains(C::USE_MSR_BITMAPS));
                prop_assert_eq!(p02.msr_exits(msr, write), l0_guards || l1.msr_exits(msr, write), "MSR {:#x}", msr);
            }
        }
        for (vector, code) in events {
            if l0.exception_exits(vector, code) || l1.exception_exits(vector, code) {
                prop_assert!(p02.exception_exits(vector, code), "vector {} code {:#x}", vector, code);
            }
        }
        // A value that differs in many bits of what L2 reads meets one of L1's whatever becomes of L0's.
        let (read0, read4) = (
            l1.cr0.read(b.vmcs12.get(Field::GuestCr0)),
            l1.cr4.read(b.vmcs12.get(Field::GuestCr4)),
        );
        let flips: Vec<u64> = (0..64).flat_map(|n| [read0 ^ 1 << n, read4 ^ 1 << n]).collect();
        for value in values.iter().chain(&targets).chain(&flips) {
            let forbidden = l0.primary.contains(C::CR3_LOAD_EXITING) || l1.cr3_load_exits(*value);
            prop_assert_eq!(p02.cr3_load_exits(*value), forbidden);
            prop_assert!(!l1.cr0.exits(*value) || p02.cr0.exits(*value));
            prop_assert!(!l1.cr4.exits(*value) || p02.cr4.exits(*value));
            // Bits that are L0's alone can't change without an exit either.
            let cr4 = b.vmcs12.get(Field::GuestCr4);
            if (value ^ cr4) & b.vmcs01.controls.cr4_mask & !b.vmcs12.get(Field::Cr4Mask) != 0 {
                prop_assert!(p02.cr4.exits(*value));
            }
            // An unrestricted guest may change PE and PG (§24.8), bits 0 and 31.
            let free = if l1.secondary.contains(S::UNRESTRICTED_GUEST) { 1 | 1 << 31 } else { 0 };
            let cr0 = b.vmcs12.get(Field::GuestCr0);
            if (value ^ cr0) & b.vmcs01.controls.cr0_mask & !free & !b.vmcs12.get(Field::Cr0Mask) != 0 {
                prop_assert!(p02.cr0.exits(*value));
            }
        }
        for c8 in [C::CR8_LOAD_EXITING, C::CR8_STORE_EXITING] {
            let wanted = l1.primary.contains(c8)
                || l0.primary.contains(c8) && !l1.primary.contains(C::USE_TPR_SHADOW);
            prop_assert_eq!(p02.primary.contains(c8), wanted);
        }
        // L2 reads of CR0 what it would under VMCS12 alone.
        let cr0 = b.vmcs12.get(Field::GuestCr0);
        prop_assert_eq!(p02.cr0.read(cr0), l1.cr0.read(cr0));
    }
}

#[test]
fn origins_tell_who_set_a_bit() {
    let mut b = Bench::new(C::HLT_EXITING | C::SECONDARY_CONTROLS | C::RDPMC_EXITING, C::all());
    b.vmcs12.set(
        Field::PrimaryControls,
        (C::HLT_EXITING | C::RDTSC_EXITING | C::SECONDARY_CONTROLS).bits().into(),
    );
    b.vmcs12.set(Field::SecondaryControls, (S::ENABLE_PML | S::ENABLE_EPT | S::RDRAND_EXITING).bits().into());
    b.engine.primary.must_be_one = 1 << 1;
    b.caps.primary.must_be_one = 1 << 1;
    let o = b.merge().origins;
    assert_eq!(o.primary.of(7), Provenance::Both);
    assert_eq!(o.primary.of(12), Provenance::L1Wants);
    assert_eq!(o.primary.of(11), Provenance::L0Needs);
    assert_eq!(o.primary.of(1), Provenance::Forced);
    assert_eq!(o.primary.of(30), Provenance::Off);
    assert_eq!(o.secondary.of(17), Provenance::Emulated, "PML is L0's work");
    assert_eq!(o.secondary.of(1), Provenance::Both);
    assert_eq!(o.secondary.of(11), Provenance::L1Wants);
}

/// SDM Vol. 3C §26.3: with NMI exiting and without virtual NMIs, IRET does not end the
/// blocking of NMIs; so VMCS02 must not have virtual NMIs for L0's sake.
#[test]
fn virtual_nmis_follow_l1_where_it_takes_nmis() {
    let mut b = Bench::new(C::empty(), C::empty());
    b.vmcs01.controls.pin = P::NMI_EXITING | P::VIRTUAL_NMIS;
    let mut virtual_nmis = |pin12: P| {
        b.vmcs12.set(Field::PinControls, pin12.bits().into());
        let pin = b.merge().controls.pin;
        assert!(pin.contains(P::NMI_EXITING));
        pin.contains(P::VIRTUAL_NMIS)
    };
    assert!(virtual_nmis(P::empty()));
    assert!(!virtual_nmis(P::NMI_EXITING));
    assert!(virtual_nmis(P::NMI_EXITING | P::VIRTUAL_NMIS));
}

#[test]
fn the_sooner_timer_counts() {
    let mut v = EngineVmcs::default();
    for (l0, l1, expected) in
        [(None, None, None), (Some(5), None, Some(5)), (Some(5), Some(3), Some(3)), (None, Some(0), Some(0))]
    {
        set_timer(&mut v, l0, l1);
        assert_eq!(v.controls.pin.contains(P::VMX_PREEMPTION_TIMER), expected.is_some());
        assert_eq!(v.guest.preemption_timer, expected.unwrap_or(0));
    }
}

#[test]
fn windows_of_l0_come_and_go() {
    let b = Bench::new(C::HLT_EXITING, C::NMI_WINDOW_EXITING);
    let mut v = EngineVmcs { controls: b.merge().controls, ..EngineVmcs::default() };
    set_windows(&mut v, &b.vmcs12, C::INTERRUPT_WINDOW_EXITING);
    assert!(
        v.controls.primary.contains(C::INTERRUPT_WINDOW_EXITING | C::NMI_WINDOW_EXITING | C::HLT_EXITING)
    );
    set_windows(&mut v, &b.vmcs12, C::empty());
    assert!(!v.controls.primary.contains(C::INTERRUPT_WINDOW_EXITING));
    assert!(v.controls.primary.contains(C::NMI_WINDOW_EXITING), "L1 still waits");
}

#[test]
fn apic_pages_are_found_in_machine_memory_or_nowhere() {
    let mut b = Bench::new(C::empty(), C::USE_TPR_SHADOW | C::SECONDARY_CONTROLS);
    b.vmcs12.set(Field::SecondaryControls, S::VIRTUALIZE_APIC.bits().into());
    b.vmcs12.set(Field::VirtualApicAddress, 0x7000);
    b.vmcs12.set(Field::ApicAccessAddress, 0xfee0_0000);
    b.vmcs12.set(Field::TprThreshold, 5);
    let m = b.merge();
    assert_eq!(m.controls.virtual_apic, b.ram.machine(L1Gpa(0x7000)).unwrap());
    assert_eq!(m.controls.apic_access, PAGES.nowhere);
    assert_eq!(m.apic_access_elsewhere, Some(L1Gpa(0xfee0_0000)));
    assert_eq!(m.controls.tpr_threshold, 5);
}

/// A bitmap page that is not RAM reads as ones: everything exits.
#[test]
fn bitmaps_in_a_hole_forbid_everything() {
    let mut b = Bench::new(C::USE_MSR_BITMAPS, C::USE_MSR_BITMAPS | C::USE_IO_BITMAPS);
    b.vmcs12.set(Field::MsrBitmap, 0x8000_0000);
    b.vmcs12.set(Field::IoBitmapA, 0x8000_0000);
    let c = b.merge().controls;
    let p = Processor::engine(&b, &c);
    assert!(p.msr_exits(0x10, false) && p.io_exits(0x80) && !p.io_exits(0x8080));
    assert!(bitmaps::msr_exits(&b.vmcs12, &b.ram, 0x10, false));
}

/// §25.6.4: an access exits if the bit of any of its ports is set, or if it wraps around.
#[test]
fn io_accesses_of_several_bytes() {
    let b = Bench::new(C::empty(), C::USE_IO_BITMAPS);
    b.memory.write(MachineAddr(L1_IO_B), &[1]).unwrap();
    let exits = |port, size| bitmaps::io_exits(&b.vmcs12, &b.ram, port, size);
    assert!(exits(0x8000, 1) && exits(0x7fff, 2) && exits(0x7ffd, 4));
    assert!(!exits(0x7fff, 1) && !exits(0x7ffc, 4) && !exits(0x8001, 4));
    assert!(exits(0xffff, 2) && exits(0xfffd, 4) && !exits(0xfffc, 4));
}

#[test]
fn tsc_offsets_add_up_and_scaling_needs_offsetting() {
    let mut b = Bench::new(C::USE_TSC_OFFSETTING, C::empty());
    b.vmcs01.controls.tsc_offset = 1000;
    b.vmcs12.set(Field::TscOffset, 50);
    assert_eq!(b.merge().controls.tsc_offset, 1000, "VMCS12 does not use its offset");
    b.vmcs12.set(Field::PrimaryControls, (C::USE_TSC_OFFSETTING | C::SECONDARY_CONTROLS).bits().into());
    assert_eq!(b.merge().controls.tsc_offset, 1050);
    b.vmcs12.set(Field::SecondaryControls, S::USE_TSC_SCALING.bits().into());
    b.vmcs12.set(Field::TscMultiplier, tsc::UNIT / 2);
    let c = b.merge().controls;
    assert_eq!((c.tsc_offset, c.tsc_multiplier), (550, tsc::UNIT / 2));
    assert!(c.secondary.contains(S::USE_TSC_SCALING));
}

proptest! {
    /// Any VMCS12 goes through merge, entry, routing, reflection and the view without a panic,
    /// whatever the entry checks would have said.
    #[test]
    fn any_vmcs12_is_survived(
        values in prop::collection::vec(any::<u64>(), Field::COUNT),
        qualification: u64, info: u32, gpr: [u64; 16],
    ) {
        use crate::physical::{MsrFault, Msrs};
        use crate::{enter, reflect, route, view};
        use engine::{GuestRegs, GuestState, VmExit};
        use x86_spec::exit::ExitReason;

        struct NoMsrs;
        impl Msrs for NoMsrs {
            fn read_msr(&mut self, _: &GuestState, _: &GuestRegs, _: u32) -> Result<u64, MsrFault> {
                Ok(0)
            }
            fn write_msr(&mut self, _: &mut GuestState, _: &mut GuestRegs, _: u32, _: u64) -> Result<(), MsrFault> {
                Ok(())
            }
            fn x2apic(&self) -> bool {
                true
            }
        }

        let mut b = Bench::new(C::USE_MSR_BITMAPS | C::UNCOND_IO_EXITING | C::SECONDARY_CONTROLS, C::empty());
        for (f, v) in Field::ALL.iter().zip(values) {
            b.vmcs12.set(*f, v);
        }
        let merged = b.merge();
        let origins = merged.origins;
        let mut vmcs02 = EngineVmcs::default();
        let mut regs = GuestRegs { gpr, ..GuestRegs::reset() };
        let entered = enter::enter(&mut vmcs02, merged, &b.vmcs01, &b.vmcs12, &mut regs, &b.ram, &mut NoMsrs);
        let view = view::ThreeWay {
            vmcs01: &b.vmcs01, vmcs12: Some(&b.vmcs12), vmcs02: Some(&vmcs02), origins: Some(&origins),
        };
        prop_assert!(view.to_string().contains("Guest RIP"));
        let mut vmcs01 = b.vmcs01.clone();
        for reason in ExitReason::ALL {
            let exit = VmExit { instruction_info: info, ..VmExit::new(*reason).qualified(qualification) };
            let context = route::Context {
                vmcs12: &b.vmcs12, guest: &vmcs02.guest, regs: &regs, l1: &b.ram,
                timer12_expired: false, mtf_injected: false,
            };
            route::route(&exit, &context);
        }
        let mut parts = reflect::Parts {
            vmcs12: &mut b.vmcs12, vmcs01: &mut vmcs01, vmcs02: &vmcs02, regs: &mut regs, l1: &b.ram,
            msrs: &mut NoMsrs, timer12: None, physical_bits: 46,
        };
        let _ = match entered {
            Ok(()) => reflect::reflect(&VmExit::new(ExitReason::Cpuid), &mut parts),
            Err(failed) => crate::enter::FailedEntry::from(failed).reflect(&mut parts),
        };
    }
}

/// SDM Vol. 3C §24.8: PE and PG are fixed to 1 for L1 in root operation and for an L2 that is not an
/// unrestricted guest.
#[test]
fn an_unrestricted_guest_may_leave_paging_and_protection() {
    let mut b = Bench::new(C::SECONDARY_CONTROLS, C::SECONDARY_CONTROLS);
    b.vmcs01.controls.secondary |= S::UNRESTRICTED_GUEST;
    b.vmcs01.controls.cr0_mask = Capabilities::CR0_FIXED0;
    b.vmcs12.set(Field::GuestCr0, cr0::PE | cr0::PG | cr0::NE);
    assert_eq!(b.merge().controls.cr0_mask, cr0::PE | cr0::PG | cr0::NE);
    b.vmcs12.set(Field::SecondaryControls, (S::ENABLE_EPT | S::UNRESTRICTED_GUEST).bits().into());
    assert_eq!(b.merge().controls.cr0_mask, cr0::NE);
    b.vmcs12.set(Field::Cr0Mask, cr0::PG);
    assert_eq!(b.merge().controls.cr0_mask, cr0::NE | cr0::PG, "L1 may still hold it");
}

#[test]
fn the_view_names_bits_values_and_origins() {
    let mut b = Bench::new(C::HLT_EXITING, C::RDTSC_EXITING);
    b.vmcs12.set(Field::GuestRip, 0x1234);
    b.vmcs12.set(Field::TscOffset, 5);
    let merged = b.merge();
    let vmcs02 = EngineVmcs { controls: merged.controls, ..EngineVmcs::default() };
    let view = crate::view::ThreeWay {
        vmcs01: &b.vmcs01,
        vmcs12: Some(&b.vmcs12),
        vmcs02: Some(&vmcs02),
        origins: Some(&merged.origins),
    };
    let text = view.to_string();
    let line =
        |name: &str| text.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    let words = |name| line(name).split_whitespace().rev().take(6).collect::<Vec<_>>();
    assert_eq!(words("HLT exiting"), ["it", "needs", "L0", "1", "0", "1"]);
    assert_eq!(words("RDTSC exiting"), ["it", "wants", "L1", "1", "1", "0"]);
    assert!(!text.contains("WBINVD exiting"), "bits that nobody sets are left out");
    // VMCS02 differs from VMCS12 here, as no guest state was loaded.
    assert!(line("Guest RIP").starts_with(" *"), "{text}");
    // What there is not shows as such.
    let view = crate::view::ThreeWay { vmcs01: &b.vmcs01, vmcs12: None, vmcs02: None, origins: None };
    let text = view.to_string();
    let words = |name: &str| {
        let line = text.lines().find(|l| l.contains(name)).expect(name);
        line.split_whitespace().rev().take(3).collect::<Vec<_>>()
    };
    assert_eq!(words("HLT exiting"), ["-", "-", "1"]);
    assert_eq!(words("Guest RIP"), ["-", "-", "0xfff0"]);
    assert!(text.contains("VMCS01 0x") && !text.contains("VMCS02 0x"), "segments: {text}");
}

/// L1 writes to its MSR bitmap, has it elsewhere, or has MSRs virtualized: each entry sees it, though what was
/// combined before is kept as long as it is right.
#[test]
fn the_msr_bitmap_follows_every_change() {
    let mut b = Bench::new(C::USE_MSR_BITMAPS, C::USE_MSR_BITMAPS | C::SECONDARY_CONTROLS);
    let reads = |msr: u64| msr;
    let set = |b: &Bench, page: u64, msr: u64, value: u8| {
        b.memory.write(MachineAddr(page + msr / 8), &[value << (msr % 8)]).unwrap();
    };
    for page in [L0_MSR.0, L1_MSR] {
        b.memory.fill(MachineAddr(page), 0, 0x1000).unwrap();
    }
    set(&b, L0_MSR.0, reads(0x808), 1);
    let passes = |b: &Bench, msr| {
        b.merge();
        !b.bit(PAGES.msr_bitmap.0, reads(msr))
    };
    assert!(passes(&b, 0x10) && !passes(&b, 0x808));
    set(&b, L1_MSR, reads(0x10), 1);
    assert!(!passes(&b, 0x10));
    assert!(!passes(&b, 0x10), "as before");
    set(&b, L1_MSR, reads(0x10), 0);
    assert!(passes(&b, 0x10));
    b.vmcs12.set(Field::SecondaryControls, S::VIRTUALIZE_X2APIC.bits().into());
    assert!(passes(&b, 0x808), "virtualized, so L0's bit does not count");
    b.vmcs12.set(Field::SecondaryControls, 0);
    assert!(!passes(&b, 0x808));
    // Not RAM: all bits read as one.
    b.vmcs12.set(Field::MsrBitmap, 1 << 40);
    assert!(!passes(&b, 0x10));
    b.vmcs12.set(Field::MsrBitmap, L1_MSR);
    assert!(passes(&b, 0x10));
}
