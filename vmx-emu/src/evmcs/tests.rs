//! The enlightened VMCS: its layout, clean bits, and the instructions that meet it.

use engine::interruptibility;
use proptest::prelude::*;
use x86_spec::exit::ExitReason as R;

use super::*;
use crate::explain::InstructionError;
use crate::instructions::{EntryKind, Outcome};
use crate::l1::L1 as _;
use crate::state::VmResult;
use crate::testing::*;
use crate::vmcs12::{self, LaunchState};

/// The assist page, and two places for the structure.
const ASSIST: u64 = 0x4000;
const EVMCS_A: u64 = 0x5000;
const EVMCS_B: u64 = 0x6000;

fn places() -> impl Iterator<Item = (Group, Place)> {
    GROUPS.iter().flat_map(|(g, places)| places.iter().map(move |p| (*g, *p)))
}

fn place(field: Field) -> Place {
    places().map(|(_, p)| p).find(|p| p.field == field).unwrap()
}

/// In VMX root operation, with an assist page that names [`EVMCS_A`].
fn machine() -> Machine {
    let mut m = Machine::long().in_root();
    m.state.assist_page = Some(L1Gpa(ASSIST));
    m.put32(EVMCS_A, VERSION);
    m.put32(EVMCS_B, VERSION);
    select(&mut m, EVMCS_A);
    m
}

fn select(m: &mut Machine, pointer: u64) {
    m.put64(ASSIST + 40, 1);
    m.put64(ASSIST + 48, pointer);
}

fn set(m: &mut Machine, at: u64, field: Field, value: u64) {
    let mut evmcs = Evmcs::read(m.l1.physical(), L1Gpa(at));
    evmcs.set(place(field), value);
    evmcs.write(m.l1.physical(), L1Gpa(at));
}

fn clean(m: &mut Machine, at: u64, bits: u32) {
    m.put32(at + CLEAN_FIELDS_OFFSET as u64, bits);
}

fn get(m: &Machine, field: Field) -> u64 {
    m.state.current().unwrap().get(field)
}

const ENTER: Outcome = Outcome::Enter(EntryKind::Resume);

/// Offset and size of each member of `struct hv_enlightened_vmcs` in the headers of Linux 6.1.
#[test]
fn layout_is_the_specified_one() {
    let expected = [
        ("HOST_ES_SELECTOR", 8, 2),
        ("HOST_CS_SELECTOR", 10, 2),
        ("HOST_SS_SELECTOR", 12, 2),
        ("HOST_DS_SELECTOR", 14, 2),
        ("HOST_FS_SELECTOR", 16, 2),
        ("HOST_GS_SELECTOR", 18, 2),
        ("HOST_TR_SELECTOR", 20, 2),
        ("HOST_IA32_PAT", 24, 8),
        ("HOST_IA32_EFER", 32, 8),
        ("HOST_CR0", 40, 8),
        ("HOST_CR3", 48, 8),
        ("HOST_CR4", 56, 8),
        ("HOST_IA32_SYSENTER_ESP", 64, 8),
        ("HOST_IA32_SYSENTER_EIP", 72, 8),
        ("HOST_RIP", 80, 8),
        ("HOST_IA32_SYSENTER_CS", 88, 4),
        ("PIN_BASED_VM_EXEC_CONTROL", 92, 4),
        ("VM_EXIT_CONTROLS", 96, 4),
        ("SECONDARY_VM_EXEC_CONTROL", 100, 4),
        ("IO_BITMAP_A", 104, 8),
        ("IO_BITMAP_B", 112, 8),
        ("MSR_BITMAP", 120, 8),
        ("GUEST_ES_SELECTOR", 128, 2),
        ("GUEST_CS_SELECTOR", 130, 2),
        ("GUEST_SS_SELECTOR", 132, 2),
        ("GUEST_DS_SELECTOR", 134, 2),
        ("GUEST_FS_SELECTOR", 136, 2),
        ("GUEST_GS_SELECTOR", 138, 2),
        ("GUEST_LDTR_SELECTOR", 140, 2),
        ("GUEST_TR_SELECTOR", 142, 2),
        ("GUEST_ES_LIMIT", 144, 4),
        ("GUEST_CS_LIMIT", 148, 4),
        ("GUEST_SS_LIMIT", 152, 4),
        ("GUEST_DS_LIMIT", 156, 4),
        ("GUEST_FS_LIMIT", 160, 4),
        ("GUEST_GS_LIMIT", 164, 4),
        ("GUEST_LDTR_LIMIT", 168, 4),
        ("GUEST_TR_LIMIT", 172, 4),
        ("GUEST_GDTR_LIMIT", 176, 4),
        ("GUEST_IDTR_LIMIT", 180, 4),
        ("GUEST_ES_AR_BYTES", 184, 4),
        ("GUEST_CS_AR_BYTES", 188, 4),
        ("GUEST_SS_AR_BYTES", 192, 4),
        ("GUEST_DS_AR_BYTES", 196, 4),
        ("GUEST_FS_AR_BYTES", 200, 4),
        ("GUEST_GS_AR_BYTES", 204, 4),
        ("GUEST_LDTR_AR_BYTES", 208, 4),
        ("GUEST_TR_AR_BYTES", 212, 4),
        ("GUEST_ES_BASE", 216, 8),
        ("GUEST_CS_BASE", 224, 8),
        ("GUEST_SS_BASE", 232, 8),
        ("GUEST_DS_BASE", 240, 8),
        ("GUEST_FS_BASE", 248, 8),
        ("GUEST_GS_BASE", 256, 8),
        ("GUEST_LDTR_BASE", 264, 8),
        ("GUEST_TR_BASE", 272, 8),
        ("GUEST_GDTR_BASE", 280, 8),
        ("GUEST_IDTR_BASE", 288, 8),
        ("VM_EXIT_MSR_STORE_ADDR", 320, 8),
        ("VM_EXIT_MSR_LOAD_ADDR", 328, 8),
        ("VM_ENTRY_MSR_LOAD_ADDR", 336, 8),
        ("CR3_TARGET_VALUE0", 344, 8),
        ("CR3_TARGET_VALUE1", 352, 8),
        ("CR3_TARGET_VALUE2", 360, 8),
        ("CR3_TARGET_VALUE3", 368, 8),
        ("PAGE_FAULT_ERROR_CODE_MASK", 376, 4),
        ("PAGE_FAULT_ERROR_CODE_MATCH", 380, 4),
        ("CR3_TARGET_COUNT", 384, 4),
        ("VM_EXIT_MSR_STORE_COUNT", 388, 4),
        ("VM_EXIT_MSR_LOAD_COUNT", 392, 4),
        ("VM_ENTRY_MSR_LOAD_COUNT", 396, 4),
        ("TSC_OFFSET", 400, 8),
        ("VIRTUAL_APIC_PAGE_ADDR", 408, 8),
        ("VMCS_LINK_POINTER", 416, 8),
        ("GUEST_IA32_DEBUGCTL", 424, 8),
        ("GUEST_IA32_PAT", 432, 8),
        ("GUEST_IA32_EFER", 440, 8),
        ("GUEST_PDPTR0", 448, 8),
        ("GUEST_PDPTR1", 456, 8),
        ("GUEST_PDPTR2", 464, 8),
        ("GUEST_PDPTR3", 472, 8),
        ("GUEST_PENDING_DBG_EXCEPTIONS", 480, 8),
        ("GUEST_SYSENTER_ESP", 488, 8),
        ("GUEST_SYSENTER_EIP", 496, 8),
        ("GUEST_ACTIVITY_STATE", 504, 4),
        ("GUEST_SYSENTER_CS", 508, 4),
        ("CR0_GUEST_HOST_MASK", 512, 8),
        ("CR4_GUEST_HOST_MASK", 520, 8),
        ("CR0_READ_SHADOW", 528, 8),
        ("CR4_READ_SHADOW", 536, 8),
        ("GUEST_CR0", 544, 8),
        ("GUEST_CR3", 552, 8),
        ("GUEST_CR4", 560, 8),
        ("GUEST_DR7", 568, 8),
        ("HOST_FS_BASE", 576, 8),
        ("HOST_GS_BASE", 584, 8),
        ("HOST_TR_BASE", 592, 8),
        ("HOST_GDTR_BASE", 600, 8),
        ("HOST_IDTR_BASE", 608, 8),
        ("HOST_RSP", 616, 8),
        ("EPT_POINTER", 624, 8),
        ("VIRTUAL_PROCESSOR_ID", 632, 2),
        ("GUEST_PHYSICAL_ADDRESS", 680, 8),
        ("VM_INSTRUCTION_ERROR", 688, 4),
        ("VM_EXIT_REASON", 692, 4),
        ("VM_EXIT_INTR_INFO", 696, 4),
        ("VM_EXIT_INTR_ERROR_CODE", 700, 4),
        ("IDT_VECTORING_INFO_FIELD", 704, 4),
        ("IDT_VECTORING_ERROR_CODE", 708, 4),
        ("VM_EXIT_INSTRUCTION_LEN", 712, 4),
        ("VMX_INSTRUCTION_INFO", 716, 4),
        ("EXIT_QUALIFICATION", 720, 8),
        ("IO_RCX", 728, 8),
        ("IO_RSI", 736, 8),
        ("IO_RDI", 744, 8),
        ("IO_RIP", 752, 8),
        ("GUEST_LINEAR_ADDRESS", 760, 8),
        ("GUEST_RSP", 768, 8),
        ("GUEST_RFLAGS", 776, 8),
        ("GUEST_INTERRUPTIBILITY_INFO", 784, 4),
        ("CPU_BASED_VM_EXEC_CONTROL", 788, 4),
        ("EXCEPTION_BITMAP", 792, 4),
        ("VM_ENTRY_CONTROLS", 796, 4),
        ("VM_ENTRY_INTR_INFO_FIELD", 800, 4),
        ("VM_ENTRY_EXCEPTION_ERROR_CODE", 804, 4),
        ("VM_ENTRY_INSTRUCTION_LEN", 808, 4),
        ("TPR_THRESHOLD", 812, 4),
        ("GUEST_RIP", 816, 8),
        ("GUEST_IA32_PERF_GLOBAL_CTRL", 904, 8),
        ("XSS_EXIT_BITMAP", 960, 8),
        ("HOST_IA32_PERF_GLOBAL_CTRL", 976, 8),
        ("TSC_MULTIPLIER", 984, 8),
    ];
    let mut table: Vec<_> =
        places().map(|(_, p)| (p.field.name(), p.offset, p.field.width().bytes())).collect();
    table.sort_by_key(|(_, offset, _)| *offset);
    assert_eq!(table, expected);
}

/// TLFS, "Clean Fields" of the enlightened VMCS.
#[test]
fn each_clean_bit_stands_for_its_group() {
    for (field, bit) in [
        (Field::IoBitmapB, Some(0)),
        (Field::MsrBitmap, Some(1)),
        (Field::TscOffset, Some(2)),
        (Field::PinControls, Some(3)),
        (Field::PrimaryControls, Some(4)),
        (Field::EntryErrorCode, Some(5)),
        (Field::EntryControls, Some(6)),
        (Field::ExceptionBitmap, Some(7)),
        (Field::GuestCr3, Some(8)),
        (Field::Eptp, Some(9)),
        (Field::GuestRsp, Some(10)),
        (Field::GuestPdpte0, Some(11)),
        (Field::GuestCsBase, Some(12)),
        (Field::HostRsp, Some(13)),
        (Field::HostRip, Some(14)),
        (Field::GuestRip, None),
        (Field::TprThreshold, None),
        (Field::EntryMsrLoadCount, None),
    ] {
        let (group, _) = places().find(|(_, p)| p.field == field).unwrap();
        assert_eq!(group.clean_bit(), bit.map_or(0, |b| 1 << b), "{field}");
    }
}

#[test]
fn what_has_no_place_is_not_to_be_offered() {
    let (pin, secondary) = without_place();
    assert_eq!(pin, P::POSTED_INTERRUPTS | P::VMX_PREEMPTION_TIMER);
    let expected = S::VIRTUALIZE_APIC
        | S::VIRTUAL_INTERRUPT_DELIVERY
        | S::PAUSE_LOOP_EXITING
        | S::ENABLE_VM_FUNCTIONS
        | S::VMCS_SHADOWING
        | S::ENABLE_PML;
    assert_eq!(secondary, expected);
    let cpu = crate::L1Cpu { withheld_pin: pin, withheld: secondary, ..crate::capabilities::tests::CPU };
    let caps = crate::Capabilities::new(&crate::capabilities::tests::full_engine(), &cpu);
    for field in caps.fields.iter() {
        let kept_for_nothing = matches!(field, Field::ExecutiveVmcsPointer | Field::GuestSmbase);
        assert!(kept_for_nothing || places().any(|(_, p)| p.field == field), "{field}");
    }
    assert!(!caps.has_exit(x86_spec::controls::ExitControls::SAVE_VMX_PREEMPTION_TIMER));
}

#[test]
fn only_groups_that_are_not_clean_are_read_again() {
    let mut m = machine();
    assert_eq!(m.plain(R::Vmresume), ENTER);
    for (group, at) in places() {
        let mut m = machine();
        assert_eq!(m.plain(R::Vmresume), ENTER);
        set(&mut m, EVMCS_A, at.field, 0x1234);
        clean(&mut m, EVMCS_A, CLEAN_ALL);
        m.plain(R::Vmresume);
        let exit_information = at.field.field_type() == FieldType::ReadOnly;
        let kept = group != Group::Always || exit_information;
        assert_eq!(get(&m, at.field), if kept { 0 } else { 0x1234 }, "{}, clean", at.field);
        clean(&mut m, EVMCS_A, CLEAN_ALL & !group.clean_bit());
        m.plain(R::Vmresume);
        assert_eq!(get(&m, at.field), if exit_information { 0 } else { 0x1234 }, "{}", at.field);
    }
}

#[test]
fn vmlaunch_another_structure_and_vmclear_make_the_copy_void() {
    let changed = |between: &mut dyn FnMut(&mut Machine), entry: R| {
        let mut m = machine();
        m.plain(R::Vmresume);
        set(&mut m, EVMCS_A, Field::HostRip, 7);
        clean(&mut m, EVMCS_A, CLEAN_ALL);
        between(&mut m);
        select(&mut m, EVMCS_A);
        assert!(matches!(m.plain(entry), Outcome::Enter(_)));
        get(&m, Field::HostRip)
    };
    assert_eq!(changed(&mut |_| {}, R::Vmresume), 0, "the copy is good");
    assert_eq!(changed(&mut |_| {}, R::Vmlaunch), 7);
    let mut other = |m: &mut Machine| {
        select(m, EVMCS_B);
        assert_eq!(m.plain(R::Vmresume), ENTER);
    };
    assert_eq!(changed(&mut other, R::Vmresume), 7);
    let mut clear = |m: &mut Machine| assert_eq!(m.pointer(R::Vmclear, EVMCS_A), SUCCEED);
    assert_eq!(changed(&mut clear, R::Vmresume), 7);
    let mut ordinary = |m: &mut Machine| {
        assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
    };
    assert_eq!(changed(&mut ordinary, R::Vmresume), 7);
}

#[test]
fn an_impossible_structure_is_vmfail_invalid() {
    for pointer in [EVMCS_A + 64, 1 << 40, RAM as u64, VMXON] {
        let mut m = machine();
        m.plain(R::Vmresume);
        select(&mut m, pointer);
        assert_eq!(m.plain(R::Vmresume), FAIL_INVALID, "{pointer:#x}");
        assert_eq!(m.state.current_pointer(), None);
    }
    for version in [0, 2, vmcs12::REVISION] {
        let mut m = machine();
        m.put32(EVMCS_A, version);
        assert_eq!(m.plain(R::Vmlaunch), FAIL_INVALID, "version {version:#x}");
    }
}

#[test]
fn without_enlightened_entry_the_ordinary_vmcs_is_used() {
    for off in [true, false] {
        let mut m = Machine::long().with_current(VMCS_A);
        m.state.assist_page = Some(L1Gpa(ASSIST));
        if off {
            m.put64(ASSIST + 48, EVMCS_A);
        } else {
            select(&mut m, u64::MAX);
        }
        m.plain(R::Vmlaunch);
        assert_eq!(m.state.region_pointer(), Some(L1Gpa(VMCS_A)));
    }
    // And one that was enlightened is not taken for it.
    let mut m = machine();
    m.plain(R::Vmresume);
    m.put64(ASSIST + 40, 0);
    assert_eq!(m.plain(R::Vmresume), FAIL_INVALID);
    let mut m = machine();
    m.plain(R::Vmresume);
    m.state.assist_page = None;
    assert_eq!(m.plain(R::Vmresume), FAIL_INVALID);
}

#[test]
fn the_ordinary_vmcs_goes_to_its_region_and_none_is_left() {
    let mut m = Machine::long().with_current(VMCS_A);
    m.state.current_mut().unwrap().set(Field::GuestRip, 0x77);
    m.state.assist_page = Some(L1Gpa(ASSIST));
    m.put32(EVMCS_A, VERSION);
    select(&mut m, EVMCS_A);
    assert_eq!(m.plain(R::Vmresume), ENTER);
    assert_eq!(m.get64(VMCS_A + vmcs12::offset(Field::GuestRip) as u64), 0x77);
    let rip = Field::GuestRip.encoding().into();
    assert_eq!(m.field(R::Vmread, rip), FAIL_INVALID);
    assert_eq!(m.field(R::Vmwrite, rip), FAIL_INVALID);
    assert_eq!(m.plain(R::Vmptrst), SUCCEED);
    assert_eq!(m.get64(OPERAND), u64::MAX);
}

#[test]
fn vmclear_leaves_the_structure_as_it_is() {
    let content = |m: &Machine| (0..SIZE as u64 / 8).map(|i| m.get64(EVMCS_B + 8 * i)).collect::<Vec<_>>();
    let mut m = machine();
    set(&mut m, EVMCS_B, Field::HostEsSelector, 0x10);
    let before = content(&m);
    assert_eq!(m.pointer(R::Vmclear, EVMCS_B), SUCCEED);
    assert_eq!(content(&m), before);
    // Without an assist page it is a region as any other.
    m.state.assist_page = None;
    assert_eq!(m.pointer(R::Vmclear, EVMCS_B), SUCCEED);
    assert_ne!(content(&m), before);
}

#[test]
fn it_has_no_launch_state() {
    for (reason, kind, state) in [
        (R::Vmresume, EntryKind::Resume, LaunchState::Launched),
        (R::Vmlaunch, EntryKind::Launch, LaunchState::Clear),
        (R::Vmlaunch, EntryKind::Launch, LaunchState::Clear),
    ] {
        let mut m = machine();
        m.plain(R::Vmlaunch);
        assert_eq!(m.plain(reason), Outcome::Enter(kind));
        assert_eq!(m.state.current().unwrap().launch_state, state);
    }
}

#[test]
fn vmfail_valid_puts_its_error_into_the_structure() {
    let mut m = machine();
    m.l1.guest.interruptibility = interruptibility::MOV_SS;
    let error = InstructionError::EventsBlockedByMovSs;
    assert_eq!(m.plain(R::Vmresume), Outcome::Complete(VmResult::FailValid(error)));
    m.state.store_instruction_error(m.l1.physical());
    let evmcs = Evmcs::read(m.l1.physical(), L1Gpa(EVMCS_A));
    assert_eq!(evmcs.value(place(Field::VmInstructionError)), u64::from(error.number()));
    assert_eq!(evmcs.clean_fields(), 0, "nothing else was taken over for L1");
}

/// SDM Vol. 3C §28.2, §28.3: exit information and guest state.
#[test]
fn an_exit_writes_what_it_changes_and_no_more() {
    let mut m = machine();
    m.plain(R::Vmresume);
    for (i, (_, p)) in places().enumerate() {
        m.state.current_mut().unwrap().set(p.field, i as u64 + 1);
    }
    m.state.store_enlightened(m.l1.physical());
    let evmcs = Evmcs::read(m.l1.physical(), L1Gpa(EVMCS_A));
    assert_eq!(evmcs.version(), VERSION);
    assert_eq!(evmcs.clean_fields(), CLEAN_ALL);
    for (i, (_, p)) in places().enumerate() {
        let written = match p.field.field_type() {
            FieldType::Guest | FieldType::ReadOnly => true,
            FieldType::Control => matches!(p.field, Field::EntryInterruptionInfo | Field::EntryControls),
            FieldType::Host => false,
        };
        assert_eq!(evmcs.value(p), if written { i as u64 + 1 } else { 0 }, "{}", p.field);
    }
}

proptest! {
    #[test]
    fn any_content_is_accepted(bytes in proptest::collection::vec(any::<u8>(), SIZE)) {
        let evmcs = Evmcs(bytes.clone().try_into().unwrap());
        let mut vmcs = Vmcs12::default();
        evmcs.load_all(&mut vmcs);
        for (_, p) in places() {
            let at = p.offset as usize;
            let mut raw = [0; 8];
            let width = p.field.width().bytes() as usize;
            raw[..width].copy_from_slice(&bytes[at..at + width]);
            prop_assert_eq!(vmcs.get(p.field), u64::from_le_bytes(raw));
        }
        let mut back = evmcs.clone();
        back.store_exit(&vmcs);
        back.put(CLEAN_FIELDS_OFFSET, evmcs.clean_fields().to_le_bytes());
        prop_assert_eq!(&back.0, &evmcs.0);
    }
}
