//! The enlightened VMCS, version 1 (Hyper-V Top-Level Functional Specification, "Nested
//! Virtualization"): a VMCS that L1 reads and writes as ordinary memory.
//!
//! The structure has a fixed layout ([`GROUPS`]) and takes the place of a VMCS region. Which one a
//! VM entry uses is said in the virtual-processor assist page ([`nested_vmcs`]), so that
//! VMPTRLD is not needed either. L1 keeps a word of clean bits: L0 holds a copy of the structure
//! from entry to entry and reads again only the groups whose bit L1 has cleared.
//!
//! Not supported: the synthetic controls, the enlightenments control (direct virtual flush,
//! enlightened MSR bitmap) and the fields of CET, LBR, BNDCFGS and ENCLS exiting, none of which is
//! offered. What the structure has no place for can't be used with it; [`without_place`] says
//! which controls that concerns.

use memory::L1Gpa;
use x86_spec::controls::{PinbasedControls as P, SecondaryControls as S};

use crate::fields::{Existence, Field, FieldType, Width};
use crate::physical::L1Physical;
use crate::vmcs12::Vmcs12;

/// Size of the structure in bytes.
pub const SIZE: usize = 1024;
/// The one version there is: the structure's first dword, and CPUID leaf 4000000AH.
pub const VERSION: u32 = 1;
/// Where the word of clean bits is.
pub const CLEAN_FIELDS_OFFSET: usize = 824;
/// The clean bits that are defined.
pub const CLEAN_ALL: u32 = 0xffff;

/// Where the assist page says whether entries are enlightened (a byte), and 8 bytes on, with which
/// structure (an address).
const ENLIGHTEN_ENTRY_OFFSET: u64 = 40;

/// Fields that one clean bit stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// No bit stands for them: read at each entry.
    Always,
    /// Addresses of the I/O bitmaps.
    IoBitmap,
    /// Address of the MSR bitmaps.
    MsrBitmap,
    /// TSC, virtual-APIC page, XSS.
    ControlGroup2,
    /// Pin-based, secondary and exit controls.
    ControlGroup1,
    /// Primary controls.
    ControlProc,
    /// Event injection.
    ControlEvent,
    /// Entry controls.
    ControlEntry,
    /// Exception bitmap.
    ControlException,
    /// Control and debug registers.
    CrDr,
    /// Address translation.
    ControlXlat,
    /// RSP, RFLAGS, interruptibility.
    GuestBasic,
    /// MSRs, PDPTEs, activity and the link pointer.
    GuestGroup1,
    /// Segments and descriptor tables.
    GuestGroup2,
    /// Bases and stack of the host.
    HostPointer,
    /// The rest of the host state.
    HostGroup1,
}

impl Group {
    /// The clean bit; 0 for [`Self::Always`].
    pub const fn clean_bit(self) -> u32 {
        match self {
            Self::Always => 0,
            other => 1 << (other as u32 - 1),
        }
    }
}

/// A field and its offset in bytes. It has [`Field::width`] there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The field.
    pub field: Field,
    /// Where it is.
    pub offset: u16,
}

macro_rules! groups {
    ($($group:ident { $($field:ident $offset:literal;)* })*) => {
        /// The layout: what each clean bit stands for. CR3 targets, MSR lists and the page-fault
        /// filter have no bit in the specification.
        pub const GROUPS: &[(Group, &[Place])] = &[
            $((Group::$group, &[$(Place { field: Field::$field, offset: $offset },)*]),)*
        ];

        // Each field in a line of its own, so that offsets and widths are constants: this is on the path of
        // every exit.
        impl Evmcs {
            /// Takes the fields of the groups that are not in `clean`; of VM-exit information,
            /// which is L0's to write, only if `exit_information`.
            fn load(&self, vmcs: &mut Vmcs12, clean: u32, exit_information: bool) {
                $(if clean & Group::$group.clean_bit() == 0 {
                    $(if exit_information || const { !is_exit_information(Field::$field) } {
                        let place = Place { field: Field::$field, offset: $offset };
                        vmcs.set(place.field, self.value(place));
                    })*
                })*
            }

            /// Puts in the fields that an exit changes.
            fn store(&mut self, vmcs: &Vmcs12) {
                $($(if const { changes_at_exit(Field::$field) } {
                    let place = Place { field: Field::$field, offset: $offset };
                    self.set(place, vmcs.get(place.field));
                })*)*
            }
        }
    };
}

groups! {
    Always {
        ExitMsrStoreAddress 320; ExitMsrLoadAddress 328; EntryMsrLoadAddress 336; Cr3Target0 344;
        Cr3Target1 352; Cr3Target2 360; Cr3Target3 368; PageFaultErrorCodeMask 376;
        PageFaultErrorCodeMatch 380; Cr3TargetCount 384; ExitMsrStoreCount 388; ExitMsrLoadCount 392;
        EntryMsrLoadCount 396; GuestPhysicalAddress 680; VmInstructionError 688; ExitReason 692;
        ExitInterruptionInfo 696; ExitInterruptionErrorCode 700; IdtVectoringInfo 704;
        IdtVectoringErrorCode 708; ExitInstructionLength 712; ExitInstructionInfo 716;
        ExitQualification 720; IoRcx 728; IoRsi 736; IoRdi 744; IoRip 752; GuestLinearAddress 760;
        TprThreshold 812; GuestRip 816;
    }
    IoBitmap {
        IoBitmapA 104; IoBitmapB 112;
    }
    MsrBitmap {
        MsrBitmap 120;
    }
    ControlGroup2 {
        TscOffset 400; VirtualApicAddress 408; XssExitBitmap 960; TscMultiplier 984;
    }
    ControlGroup1 {
        PinControls 92; ExitControls 96; SecondaryControls 100;
    }
    ControlProc {
        PrimaryControls 788;
    }
    ControlEvent {
        EntryInterruptionInfo 800; EntryErrorCode 804; EntryInstructionLength 808;
    }
    ControlEntry {
        EntryControls 796;
    }
    ControlException {
        ExceptionBitmap 792;
    }
    CrDr {
        Cr0Mask 512; Cr4Mask 520; Cr0Shadow 528; Cr4Shadow 536; GuestCr0 544; GuestCr3 552; GuestCr4 560;
        GuestDr7 568;
    }
    ControlXlat {
        Eptp 624; Vpid 632;
    }
    GuestBasic {
        GuestRsp 768; GuestRflags 776; GuestInterruptibility 784;
    }
    GuestGroup1 {
        LinkPointer 416; GuestDebugctl 424; GuestPat 432; GuestEfer 440; GuestPdpte0 448; GuestPdpte1 456;
        GuestPdpte2 464; GuestPdpte3 472; GuestPendingDebug 480; GuestSysenterEsp 488; GuestSysenterEip 496;
        GuestActivity 504; GuestSysenterCs 508; GuestPerfGlobalCtrl 904;
    }
    GuestGroup2 {
        GuestEsSelector 128; GuestCsSelector 130; GuestSsSelector 132; GuestDsSelector 134;
        GuestFsSelector 136; GuestGsSelector 138; GuestLdtrSelector 140; GuestTrSelector 142;
        GuestEsLimit 144; GuestCsLimit 148; GuestSsLimit 152; GuestDsLimit 156; GuestFsLimit 160;
        GuestGsLimit 164; GuestLdtrLimit 168; GuestTrLimit 172; GuestGdtrLimit 176; GuestIdtrLimit 180;
        GuestEsAccessRights 184; GuestCsAccessRights 188; GuestSsAccessRights 192; GuestDsAccessRights 196;
        GuestFsAccessRights 200; GuestGsAccessRights 204; GuestLdtrAccessRights 208;
        GuestTrAccessRights 212; GuestEsBase 216; GuestCsBase 224; GuestSsBase 232; GuestDsBase 240;
        GuestFsBase 248; GuestGsBase 256; GuestLdtrBase 264; GuestTrBase 272; GuestGdtrBase 280;
        GuestIdtrBase 288;
    }
    HostPointer {
        HostFsBase 576; HostGsBase 584; HostTrBase 592; HostGdtrBase 600; HostIdtrBase 608; HostRsp 616;
    }
    HostGroup1 {
        HostEsSelector 8; HostCsSelector 10; HostSsSelector 12; HostDsSelector 14; HostFsSelector 16;
        HostGsSelector 18; HostTrSelector 20; HostPat 24; HostEfer 32; HostCr0 40; HostCr3 48; HostCr4 56;
        HostSysenterEsp 64; HostSysenterEip 72; HostRip 80; HostSysenterCs 88; HostPerfGlobalCtrl 976;
    }
}

const fn is_exit_information(field: Field) -> bool {
    matches!(field.field_type(), FieldType::ReadOnly)
}

/// Whether L0 writes the field at exits: exit information, guest state and what else an exit changes
/// of a VMCS (SDM Vol. 3C §28.2, §28.3).
const fn changes_at_exit(field: Field) -> bool {
    matches!(field.field_type(), FieldType::Guest | FieldType::ReadOnly)
        || matches!(field, Field::EntryInterruptionInfo | Field::EntryControls)
}

/// Every field is inside.
const _: () = {
    let mut g = 0;
    while g < GROUPS.len() {
        let mut i = 0;
        while i < GROUPS[g].1.len() {
            let Place { field, offset } = GROUPS[g].1[i];
            assert!(offset as usize + field.width().bytes() as usize <= SIZE);
            i += 1;
        }
        g += 1;
    }
};

/// The controls that need a field which the structure has no place for: pin-based and secondary. They are not
/// offered where an enlightened VMCS can be used.
pub fn without_place() -> (P, S) {
    let has_place = |f: &Field| GROUPS.iter().any(|(_, places)| places.iter().any(|p| p.field == *f));
    let (mut pin, mut secondary) = (P::empty(), S::empty());
    for field in Field::ALL.iter().filter(|f| !has_place(f)) {
        match field.existence() {
            Existence::Pin(c) => pin |= c,
            Existence::Secondary(c) => secondary |= c,
            _ => {}
        }
    }
    (pin, secondary)
}

/// A copy of the structure in L1's memory, taken at once: L1 can't change what was checked.
#[derive(Clone)]
pub struct Evmcs([u8; SIZE]);

impl Evmcs {
    /// Copies what is at `at`. Where there is no RAM it is all ones, whose version does not exist.
    pub fn read(memory: &dyn L1Physical, at: L1Gpa) -> Self {
        let mut bytes = [0; SIZE];
        memory.read(at, &mut bytes);
        Self(bytes)
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
    }

    #[inline(always)]
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        if let Some(to) = self.0.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
            *to = bytes;
        }
    }

    #[inline(always)]
    fn value(&self, place: Place) -> u64 {
        let at = place.offset.into();
        match place.field.width() {
            Width::Bits16 => u16::from_le_bytes(self.bytes(at)).into(),
            Width::Bits32 => u32::from_le_bytes(self.bytes(at)).into(),
            Width::Bits64 | Width::Natural => u64::from_le_bytes(self.bytes(at)),
        }
    }

    #[inline(always)]
    fn set(&mut self, place: Place, value: u64) {
        let at = place.offset.into();
        match place.field.width() {
            Width::Bits16 => self.put(at, (value as u16).to_le_bytes()),
            Width::Bits32 => self.put(at, (value as u32).to_le_bytes()),
            Width::Bits64 | Width::Natural => self.put(at, value.to_le_bytes()),
        }
    }

    /// The version: the first dword.
    pub fn version(&self) -> u32 {
        u32::from_le_bytes(self.bytes(0))
    }

    /// The clean bits.
    pub fn clean_fields(&self) -> u32 {
        u32::from_le_bytes(self.bytes(CLEAN_FIELDS_OFFSET))
    }

    /// Takes all fields into `vmcs`; those without a place are 0.
    pub fn load_all(&self, vmcs: &mut Vmcs12) {
        *vmcs = Vmcs12::default();
        self.load(vmcs, 0, true);
    }

    /// Takes the fields of the groups that are not clean into `vmcs`, which has the rest from the last
    /// entry.
    pub fn load_changed(&self, vmcs: &mut Vmcs12) {
        self.load(vmcs, self.clean_fields(), false);
    }

    /// Puts in what an exit changes; then L0's copy and the structure agree, and everything is clean.
    pub fn store_exit(&mut self, vmcs: &Vmcs12) {
        self.store(vmcs);
        self.put(CLEAN_FIELDS_OFFSET, (self.clean_fields() | CLEAN_ALL).to_le_bytes());
    }

    /// Writes it back to L1's memory.
    pub fn write(&self, memory: &dyn L1Physical, at: L1Gpa) {
        memory.write(at, &self.0);
    }
}

/// Writes the VM-instruction error of `vmcs` to the structure at `at`.
pub(crate) fn write_instruction_error(memory: &dyn L1Physical, at: L1Gpa, vmcs: &Vmcs12) {
    let mut evmcs = Evmcs::read(memory, at);
    let is_error = |p: &&Place| p.field == Field::VmInstructionError;
    if let Some(place) = GROUPS.iter().flat_map(|(_, places)| *places).find(is_error) {
        evmcs.set(*place, vmcs.get(place.field));
    }
    evmcs.write(memory, at);
}

/// The structure that VM entries use, by L1's assist page at `assist_page`. `None`: an ordinary VMCS.
pub fn nested_vmcs(memory: &dyn L1Physical, assist_page: L1Gpa) -> Option<L1Gpa> {
    let mut bytes = [0; 16];
    memory.read(assist_page.offset(ENLIGHTEN_ENTRY_OFFSET), &mut bytes);
    let enlightened = bytes.first().is_some_and(|b| *b != 0);
    let pointer = bytes.last_chunk().map_or(u64::MAX, |b| u64::from_le_bytes(*b));
    (enlightened && pointer != u64::MAX).then_some(L1Gpa(pointer))
}

#[cfg(test)]
mod tests;
