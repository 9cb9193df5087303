//! The memory-management unit: TLB, page walks in every paging mode, EPT.
//!
//! Two levels of cached translations:
//! - the *fast* TLB, probed inline by every access: per entry separate read, write and fetch tags
//!   (a tag is the linear page and the 12-bit context), and the distance to host memory;
//! - the *second-level* TLB, privilege-independent, from which fast entries are refilled
//!   without a walk; global translations live there under a context of their own.
//!
//! A context is (VPID, EPTP, PCID, paging mode) and a privilege mode. Flushing a context gives
//! it a new number, so that stale entries simply never match; nothing is cleared until the numbers
//! run out. Hence L1↔L2 switches and CR3 loads keep all that the architecture lets them keep.
//!
//! Not supported: 5-level paging, protection keys, paging-structure caches (every miss of both
//! TLBs walks), sub-page permissions, #VE. Memory types are accepted and have no effect: all memory is coherent.

use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use engine::VmExit;
use memory::{Gpa, MachineAddr};
use x86_spec::controls::SecondaryControls;
use x86_spec::ept;
use x86_spec::exception::{self, pf};
use x86_spec::exit::{ExitReason, ept_violation};
use x86_spec::reg::{cr0, cr4, efer};
use x86_spec::segment::seg;

use crate::cpu::{Access, CodeSize, Cpu, Exec, PRIV_SUPERVISOR, PRIV_USER, PRIV_USER_ALIGN, Reason, Stop};

/// Physical-address width that this processor has (CPUID 80000008H EAX 7:0).
pub const MAXPHYADDR: u32 = 46;
/// Bits of an entry above the physical-address width, up to bit 51: reserved.
const RESERVED_ADDR: u64 = 0x000f_ffff_ffff_ffff & !((1 << MAXPHYADDR) - 1);
/// Physical address of the next table or page in an entry.
const ENTRY_ADDR: u64 = 0x000f_ffff_ffff_f000;

/// Entries of the fast TLB.
pub(crate) const TLB_ENTRIES: usize = 4096;
const SECOND_ENTRIES: usize = 8192;
const EPT_ENTRIES: usize = 1024;
/// A tag that nothing matches: its context is never handed out.
const INVALID: u64 = u64::MAX;
/// Context numbers are 10 bits; the last is not used.
const LAST_CONTEXT: u16 = 1022;
const MAX_SPACES: usize = 128;
const LARGE_FILTER_WORDS: usize = 64;

/// Paging-structure entry bits (SDM Vol. 3A §4.5).
mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const XD: u64 = 1 << 63;
}

/// A value that one access can move.
pub trait Scalar: Copy {
    /// Size in bytes.
    const SIZE: u32;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Truncates.
    fn from_u64(v: u64) -> Self;
}
macro_rules! scalar {
    ($($t:ty),*) => {$(
        impl Scalar for $t {
            const SIZE: u32 = size_of::<$t>() as u32;
            #[inline(always)]
            fn to_u64(self) -> u64 { self as u64 }
            #[inline(always)]
            fn from_u64(v: u64) -> Self { v as $t }
        }
    )*};
}
scalar!(u8, u16, u32, u64);

/// A fast-TLB entry.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct TlbEntry {
    /// Tag for reads.
    pub read: u64,
    /// Tag for writes.
    pub write: u64,
    /// Tag for fetches.
    pub fetch: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

const EMPTY_ENTRY: TlbEntry = TlbEntry { read: INVALID, write: INVALID, fetch: INVALID, addend: 0 };

/// What a completed walk knows of a page, privilege-independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Translation {
    /// Machine address of the 4 KiB page.
    machine: u64,
    flags: u16,
}

mod tf {
    pub const USER: u16 = 1 << 0;
    pub const WRITE: u16 = 1 << 1;
    pub const XD: u16 = 1 << 2;
    /// Writes need no more bookkeeping (dirty bits are set).
    pub const DIRTY: u16 = 1 << 3;
    pub const GLOBAL: u16 = 1 << 4;
    pub const EPT_R: u16 = 1 << 5;
    pub const EPT_W: u16 = 1 << 6;
    pub const EPT_X: u16 = 1 << 7;
    pub const LARGE_2M: u16 = 1 << 8;
    pub const LARGE_1G: u16 = 1 << 9;
}

#[derive(Clone, Copy)]
struct SecondEntry {
    tag: u64,
    translation: Translation,
}

#[derive(Clone, Copy)]
struct EptCacheEntry {
    /// Guest-physical page base.
    gpa: u64,
    eptp: u64,
    machine: u64,
    /// EPT permission bits R, W, X; W only while no dirty flag needs setting.
    rights: u64,
}

/// Bit of [`SpaceKey::eptp`], above any address: translations made under mode-based execute control.
const BY_MODE: u64 = 1 << 63;

/// What selects a set of translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SpaceKey {
    vpid: u16,
    pcid: u16,
    eptp: u64,
    /// Control-register bits that change how entries are interpreted.
    paging: u64,
}

#[derive(Clone, Debug)]
struct Space {
    key: SpaceKey,
    context: u16,
    global_context: u16,
}

/// TLBs and paging caches of one vCPU.
#[repr(C)]
pub struct Mmu {
    /// The fast TLB.
    pub tlb: [TlbEntry; TLB_ENTRIES],
    second: Box<[SecondEntry]>,
    ept_cache: Box<[EptCacheEntry]>,
    spaces: Vec<Space>,
    current: SpaceKey,
    global_context: u16,
    next_context: u16,
    /// 2 MiB and 1 GiB regions from which a large page was cached (a filter: may say yes
    /// wrongly).
    large: Box<[u64; LARGE_FILTER_WORDS]>,
    /// Some address in the paths just taken was not canonical; [`crate::op::stopped`] turns #GP
    /// into #SS for stack-segment operands.
    pub noncanonical: bool,
    /// Grows with every change that may affect where fetches go, but for changes that a new context
    /// number or [`crate::block::BlockCache::forget_jumps`] takes care of.
    pub fetch_epoch: u64,
    mem_base: u64,
    mem_size: u64,
    /// Page walks done.
    pub walks: u64,
}

impl Mmu {
    /// An empty MMU over machine memory at `base`, `size` bytes.
    pub fn new(base: *mut u8, size: u64) -> Self {
        let no = Translation { machine: 0, flags: 0 };
        Self {
            tlb: [EMPTY_ENTRY; TLB_ENTRIES],
            second: vec![SecondEntry { tag: INVALID, translation: no }; SECOND_ENTRIES].into(),
            ept_cache: vec![EptCacheEntry { gpa: INVALID, eptp: 0, machine: 0, rights: 0 }; EPT_ENTRIES]
                .into(),
            spaces: Vec::new(),
            current: SpaceKey { vpid: 0, pcid: 0, eptp: 0, paging: u64::MAX },
            global_context: 0,
            next_context: 0,
            large: Box::new([0; LARGE_FILTER_WORDS]),
            noncanonical: false,
            fetch_epoch: 1,
            mem_base: base as u64,
            mem_size: size,
            walks: 0,
        }
    }

    fn large_bit(key: u64) -> (usize, u64) {
        let h = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((h / 64) as usize, 1 << (h % 64))
    }
    fn note_large(&mut self, key: u64) {
        let (w, b) = Self::large_bit(key);
        self.large[w] |= b;
    }
    fn maybe_large(&self, key: u64) -> bool {
        let (w, b) = Self::large_bit(key);
        self.large[w] & b != 0
    }

    fn new_context(&mut self) -> u16 {
        if self.next_context > LAST_CONTEXT {
            self.clear();
        }
        self.next_context += 1;
        self.next_context - 1
    }

    /// Drops everything.
    fn clear(&mut self) {
        self.tlb.fill(EMPTY_ENTRY);
        self.second.iter_mut().for_each(|e| e.tag = INVALID);
        self.ept_cache.iter_mut().for_each(|e| e.gpa = INVALID);
        self.spaces.clear();
        self.large.fill(0);
        self.next_context = 0;
        self.fetch_epoch += 1;
    }

    /// Finds or makes the space for `key`; returns its context number.
    fn select(&mut self, key: SpaceKey) -> u16 {
        self.current = key;
        if let Some(s) = self.spaces.iter().find(|s| s.key == key) {
            self.global_context = s.global_context;
            return s.context;
        }
        if self.spaces.len() >= MAX_SPACES || self.next_context + 2 > LAST_CONTEXT {
            self.clear();
        }
        let shared = self
            .spaces
            .iter()
            .find(|s| s.key.vpid == key.vpid && s.key.eptp == key.eptp && s.key.paging == key.paging)
            .map(|s| s.global_context);
        let global_context = match shared {
            Some(g) => g,
            None => self.new_context(),
        };
        let context = self.new_context();
        self.global_context = global_context;
        self.spaces.push(Space { key, context, global_context });
        context
    }

    /// Forgets the spaces that `drop` selects. The current one, if among them, is
    /// made anew by the caller's [`Cpu::mmu_reselect`].
    fn drop_spaces(&mut self, drop: impl Fn(&SpaceKey) -> bool) {
        self.spaces.retain(|s| !drop(&s.key));
        if self.spaces.is_empty() {
            self.large.fill(0);
        }
    }

    fn second_index(page: u64, context: u64) -> usize {
        ((page >> 12) ^ (context << 5)) as usize & (SECOND_ENTRIES - 1)
    }

    fn second_lookup(&self, page: u64, context: u16) -> Option<Translation> {
        let e = &self.second[Self::second_index(page, context as u64)];
        (e.tag == page | context as u64).then_some(e.translation)
    }

    fn second_insert(&mut self, page: u64, context: u16, translation: Translation) {
        self.second[Self::second_index(page, context as u64)] =
            SecondEntry { tag: page | context as u64, translation };
    }

    fn second_remove(&mut self, page: u64, context: u16) {
        let e = &mut self.second[Self::second_index(page, context as u64)];
        if e.tag == page | context as u64 {
            e.tag = INVALID;
        }
    }

    /// Takes write permission for a machine page out of the fast TLB, because code from it is
    /// now cached.
    pub fn protect_code_page(&mut self, machine_page: u64) {
        let host = self.mem_base + (machine_page << 12);
        for e in self.tlb.iter_mut() {
            if e.write != INVALID && (e.write & !0xfff).wrapping_add(e.addend) == host {
                e.write = INVALID;
            }
        }
    }

    /// Whether `len` bytes at this machine address are memory.
    fn is_memory(&self, machine: u64, len: u64) -> bool {
        machine < self.mem_size && self.mem_size - machine >= len
    }

    fn host(&self, machine: u64) -> *mut u8 {
        (self.mem_base + machine) as *mut u8
    }
}

/// Where a page-walk or data access ended that EPT does not let through.
struct EptMiss {
    exit: VmExit,
    /// An EPT violation (not a misconfiguration).
    violation: bool,
}

/// Where an access goes.
enum Target {
    /// Memory: a host pointer to the first byte.
    Memory(*mut u8),
    /// The exit bus, at this guest-physical address.
    Bus(u64),
    /// The APIC-access page.
    Apic,
}

/// How the linear address is accessed.
#[derive(Clone, Copy, PartialEq, Eq)]
struct How {
    access: Access,
    /// Privilege mode (`PRIV_*`).
    mode: u64,
}

impl How {
    fn user(self) -> bool {
        self.mode == PRIV_USER || self.mode == PRIV_USER_ALIGN
    }
}

/// Whether `linear` is canonical for 48 bits (SDM Vol. 1 §3.3.7.1).
#[inline(always)]
pub const fn canonical(linear: u64) -> bool {
    ((linear as i64) << 16 >> 16) as u64 == linear
}

impl Cpu {
    // ---- contexts --------------------------------------------------------------------

    fn space_key(&self) -> SpaceKey {
        let c = &self.controls;
        let secondary = c.secondary;
        let on = |bit| {
            c.primary.contains(x86_spec::controls::PrimaryControls::SECONDARY_CONTROLS)
                && secondary.contains(bit)
        };
        SpaceKey {
            vpid: if on(SecondaryControls::ENABLE_VPID) { c.vpid } else { 0 },
            eptp: if on(SecondaryControls::ENABLE_EPT) {
                c.eptp | if on(SecondaryControls::MODE_BASED_EPT) { BY_MODE } else { 0 }
            } else {
                0
            },
            pcid: if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 },
            paging: self.paging_key(),
        }
    }

    fn paging_key(&self) -> u64 {
        if self.cr0 & cr0::PG == 0 {
            return 0;
        }
        self.cr0 & (cr0::PG | cr0::WP)
            | self.cr4 & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PCIDE)
            | (self.efer & (efer::NXE | efer::LMA)) << 32
    }

    /// Whether EPT is in use.
    fn ept_on(&self) -> bool {
        self.mmu.current.eptp != 0
    }

    /// Selects the translations that belong to the present control registers and
    /// controls.
    pub fn mmu_reselect(&mut self) {
        let key = self.space_key();
        let context = self.mmu.select(key);
        self.ctx = (context as u64) << 2 | self.ctx & 3;
    }

    /// To be called at VM entry after controls and control registers are loaded. Without
    /// VPIDs an entry flushes (SDM Vol. 3C §29.4.3.1).
    pub fn mmu_vm_entry(&mut self) {
        let key = self.space_key();
        if key.vpid == 0 {
            self.mmu.drop_spaces(|k| k.vpid == 0);
        }
        self.mmu_reselect();
    }

    /// Called by [`Cpu::update_mode`]; reselects only when paging itself changed.
    pub fn mmu_paging_mode_changed(&mut self) {
        if self.mmu.current.paging != self.paging_key() {
            self.mmu_reselect();
        }
    }

    /// Data breakpoints make the CPU single-step, so cached translations need not change.
    pub fn mmu_breakpoints_changed(&mut self) {
        self.boundary_dr7_changed();
    }

    /// Loads CR3 (SDM Vol. 3A §4.10.4.1). `flush` is false when bit 63 of the source
    /// was set with CR4.PCIDE = 1. The value has been checked.
    pub fn load_cr3(&mut self, value: u64, flush: bool) {
        self.cr3 = value & !(1 << 63);
        if flush {
            let key = self.space_key();
            self.mmu.spaces_flush_non_global(key.vpid, key.eptp, key.pcid);
        }
        self.mmu_reselect();
    }

    /// Flushes all translations of the current VPID; globals only on request.
    pub fn flush_tlb(&mut self, include_globals: bool) {
        let key = self.space_key();
        if include_globals {
            self.mmu.drop_spaces(|k| k.vpid == key.vpid && k.eptp == key.eptp);
        } else {
            self.mmu.spaces_flush_all_non_global(key.vpid, key.eptp);
        }
        self.mmu_reselect();
    }

    /// Flushes the non-global translations of one PCID (INVPCID type 1).
    pub fn flush_pcid(&mut self, pcid: u16) {
        let key = self.space_key();
        self.mmu.spaces_flush_non_global(key.vpid, key.eptp, pcid);
        self.mmu_reselect();
    }

    /// INVLPG: the page of `linear` in the current PCID, globals too (SDM Vol. 3A §4.10.4.1).
    pub fn flush_linear(&mut self, linear: u64) {
        let pcid = self.space_key().pcid;
        self.flush_page(pcid, linear, true);
    }

    /// INVPCID type 0: the page of `linear` in `pcid`, globals excepted (which it may take too).
    pub fn flush_pcid_linear(&mut self, pcid: u16, linear: u64) {
        self.flush_page(pcid, linear, false);
    }

    fn flush_page(&mut self, pcid: u16, linear: u64, globals: bool) {
        let page = linear & !0xfff;
        if self.mmu.maybe_large(linear >> 21) || self.mmu.maybe_large(linear >> 30 | 1 << 60) {
            return self.flush_tlb(true);
        }
        let key = self.space_key();
        let contexts: Vec<(u16, u16)> = self
            .mmu
            .spaces
            .iter()
            .filter(|s| s.key.vpid == key.vpid && (s.key.pcid == pcid || globals))
            .map(|s| (s.context, s.global_context))
            .collect();
        for (context, global) in contexts {
            self.mmu.second_remove(page, context);
            self.mmu.second_remove(page, global);
            for mode in 0..4 {
                let ctx = (context as u64) << 2 | mode;
                let e = &mut self.mmu.tlb[((page >> 12) ^ ctx) as usize & (TLB_ENTRIES - 1)];
                let tag = page | ctx;
                if e.read == tag || e.write == tag || e.fetch == tag {
                    *e = EMPTY_ENTRY;
                }
            }
        }
        self.blocks.forget_jumps(linear);
    }

    /// Drops everything cached, of every space.
    pub fn mmu_clear(&mut self) {
        self.mmu.clear();
        self.mmu_reselect();
    }

    /// INVEPT single-context.
    pub fn mmu_invalidate_eptp(&mut self, eptp: u64) {
        self.mmu.drop_spaces(|k| k.eptp & ENTRY_ADDR == eptp & ENTRY_ADDR);
        self.mmu.ept_cache.iter_mut().for_each(|e| e.gpa = INVALID);
        self.mmu_reselect();
    }

    /// INVVPID single-context.
    pub fn mmu_invalidate_vpid(&mut self, vpid: u16) {
        self.mmu.drop_spaces(|k| k.vpid == vpid);
        self.mmu_reselect();
    }

    /// INVVPID individual-address.
    pub fn mmu_invalidate_address(&mut self, vpid: u16, linear: u64) {
        if self.space_key().vpid == vpid {
            self.flush_page(self.space_key().pcid, linear, true);
        } else {
            self.mmu_invalidate_vpid(vpid);
        }
    }

    // ---- typed accesses ----------------------------------------------------------------

    /// Reads at the current privilege.
    ///
    /// # Errors
    /// #PF, #GP (not canonical), #AC, VM exits.
    #[inline(always)]
    pub fn read<T: Scalar>(&mut self, linear: u64) -> Exec<T> {
        let e = &self.mmu.tlb[((linear >> 12) ^ self.ctx) as usize & (TLB_ENTRIES - 1)];
        let tag = linear.wrapping_add(T::SIZE as u64 - 1) & !0xfff | self.ctx;
        if e.read == tag {
            // SAFETY: a read tag is set only by `fill`, with an addend that maps the whole page to
            // machine memory, and the tag compare covers the last byte too.
            return Ok(unsafe { ptr::read_unaligned(linear.wrapping_add(e.addend) as *const T) });
        }
        self.read_slow(linear, T::SIZE).map(T::from_u64)
    }

    /// Writes at the current privilege.
    ///
    /// # Errors
    /// As [`Cpu::read`]; also stops with [`Reason::Reexecute`] before a write to the running
    /// block's own code.
    #[inline(always)]
    pub fn write<T: Scalar>(&mut self, linear: u64, value: T) -> Exec {
        let e = &self.mmu.tlb[((linear >> 12) ^ self.ctx) as usize & (TLB_ENTRIES - 1)];
        let tag = linear.wrapping_add(T::SIZE as u64 - 1) & !0xfff | self.ctx;
        if e.write == tag {
            // SAFETY: as in `read`; a write tag is never set for a page that holds cached code.
            unsafe { ptr::write_unaligned(linear.wrapping_add(e.addend) as *mut T, value) };
            return Ok(());
        }
        self.write_slow(linear, T::SIZE, value.to_u64())
    }

    /// Host pointer for a read-modify-write of a scalar, if the fast TLB has it.
    #[inline(always)]
    pub fn fast_rmw<T: Scalar>(&mut self, linear: u64) -> Option<*mut T> {
        let e = &self.mmu.tlb[((linear >> 12) ^ self.ctx) as usize & (TLB_ENTRIES - 1)];
        let tag = linear.wrapping_add(T::SIZE as u64 - 1) & !0xfff | self.ctx;
        (e.write == tag && e.read == tag).then(|| linear.wrapping_add(e.addend) as *mut T)
    }

    #[cold]
    #[inline(never)]
    fn read_slow(&mut self, linear: u64, size: u32) -> Exec<u64> {
        self.read_as(self.ctx & 3, linear, size)
    }
    #[cold]
    #[inline(never)]
    fn write_slow(&mut self, linear: u64, size: u32, value: u64) -> Exec {
        self.write_as(self.ctx & 3, linear, size, value)
    }

    /// Reads `size` (1, 2, 4, 8) bytes at the current privilege, zero-extended.
    ///
    /// # Errors
    /// As [`Cpu::read`].
    pub fn read_sized(&mut self, linear: u64, size: u8) -> Exec<u64> {
        match size {
            1 => self.read::<u8>(linear).map(u64::from),
            2 => self.read::<u16>(linear).map(u64::from),
            4 => self.read::<u32>(linear).map(u64::from),
            _ => self.read::<u64>(linear),
        }
    }

    /// Writes the low `size` (1, 2, 4, 8) bytes at the current privilege.
    ///
    /// # Errors
    /// As [`Cpu::write`].
    pub fn write_sized(&mut self, linear: u64, size: u8, value: u64) -> Exec {
        match size {
            1 => self.write(linear, value as u8),
            2 => self.write(linear, value as u16),
            4 => self.write(linear, value as u32),
            _ => self.write(linear, value),
        }
    }

    /// An implicit supervisor read (descriptor tables, TSS; SDM Vol. 3A §4.6).
    ///
    /// # Errors
    /// As [`Cpu::read`].
    pub fn sys_read<T: Scalar>(&mut self, linear: u64) -> Exec<T> {
        self.read_as(PRIV_SUPERVISOR, linear, T::SIZE).map(T::from_u64)
    }

    /// An implicit supervisor write.
    ///
    /// # Errors
    /// As [`Cpu::write`].
    pub fn sys_write<T: Scalar>(&mut self, linear: u64, value: T) -> Exec {
        self.write_as(PRIV_SUPERVISOR, linear, T::SIZE, value.to_u64())
    }

    /// Reads `size` (1, 2, 4, 8) bytes in a given privilege mode (`PRIV_*`).
    ///
    /// # Errors
    /// As [`Cpu::read`].
    pub fn read_as(&mut self, mode: u64, linear: u64, size: u32) -> Exec<u64> {
        let how = How { access: Access::Read, mode };
        let mut bytes = [0; 8];
        self.check_alignment(how, linear, size)?;
        self.transfer(how, linear, &mut bytes[..size as usize])?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes `size` (1, 2, 4, 8) bytes in a given privilege mode (`PRIV_*`).
    ///
    /// # Errors
    /// As [`Cpu::write`].
    pub fn write_as(&mut self, mode: u64, linear: u64, size: u32, value: u64) -> Exec {
        let how = How { access: Access::Write, mode };
        self.check_alignment(how, linear, size)?;
        self.transfer(how, linear, &mut value.to_le_bytes()[..size as usize])
    }

    /// Reads bytes at the current privilege; faults come before anything is transferred.
    ///
    /// # Errors
    /// As [`Cpu::read`].
    pub fn read_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Exec {
        self.transfer(How { access: Access::Read, mode: self.ctx & 3 }, linear, buf)
    }

    /// Writes bytes at the current privilege; faults come before anything is transferred.
    ///
    /// # Errors
    /// As [`Cpu::write`].
    pub fn write_bytes(&mut self, linear: u64, buf: &[u8]) -> Exec {
        let mut copy = [0u8; 1024];
        match copy.get_mut(..buf.len()) {
            Some(c) => {
                c.copy_from_slice(buf);
                self.transfer(How { access: Access::Write, mode: self.ctx & 3 }, linear, c)
            }
            None => {
                self.probe(linear, buf.len() as u32, Access::Write)?;
                for (i, chunk) in buf.chunks(1024).enumerate() {
                    self.write_bytes(linear.wrapping_add(i as u64 * 1024), chunk)?;
                }
                Ok(())
            }
        }
    }

    /// Checks that `len` bytes can be accessed, with the faults and the accessed and dirty
    /// bits of the access, without doing it.
    ///
    /// # Errors
    /// As the access.
    pub fn probe(&mut self, linear: u64, len: u32, access: Access) -> Exec {
        let how = How { access, mode: self.ctx & 3 };
        let mut at = linear;
        let end = linear.wrapping_add(len.max(1) as u64 - 1);
        loop {
            if let Target::Apic = self.target(how, at)? {
                self.check_apic_access(access, at, (end.wrapping_sub(at)) as usize + 1)?;
            }
            if at & !0xfff == end & !0xfff {
                return Ok(());
            }
            at = (at & !0xfff).wrapping_add(0x1000);
        }
    }

    /// Host pointer to `len` bytes for `access`, if they are memory within one page and
    /// need no watching; `None` otherwise.
    ///
    /// # Errors
    /// As the access.
    #[inline]
    pub fn direct(&mut self, linear: u64, len: u32, access: Access) -> Exec<Option<*mut u8>> {
        let e = &self.mmu.tlb[((linear >> 12) ^ self.ctx) as usize & (TLB_ENTRIES - 1)];
        let tag = linear.wrapping_add(len as u64 - 1) & !0xfff | self.ctx;
        let have = if access == Access::Write { e.write } else { e.read };
        if have == tag {
            return Ok(Some(linear.wrapping_add(e.addend) as *mut u8));
        }
        self.direct_slow(linear, len, access)
    }

    /// Where a byte that was just read is, if that is memory.
    ///
    /// # Errors
    /// As the read.
    pub fn data_address(&mut self, linear: u64) -> Exec<Option<MachineAddr>> {
        let how = How { access: Access::Read, mode: self.ctx & 3 };
        Ok(match self.target(how, linear)? {
            Target::Memory(p) => Some(MachineAddr(p as u64 - self.mmu.mem_base)),
            Target::Bus(_) | Target::Apic => None,
        })
    }

    #[cold]
    #[inline(never)]
    fn direct_slow(&mut self, linear: u64, len: u32, access: Access) -> Exec<Option<*mut u8>> {
        let how = How { access, mode: self.ctx & 3 };
        if how.mode == PRIV_USER_ALIGN || self.boundary.data_watch || linear & 0xfff > 0x1000 - len as u64 {
            self.probe(linear, len, access)?;
            return Ok(None);
        }
        match self.target(how, linear)? {
            Target::Memory(p) if access == Access::Write => {
                let page = (p as u64 - self.mmu.mem_base) >> 12;
                Ok((!self.memory.is_code_page(page)).then_some(p))
            }
            Target::Memory(p) => Ok(Some(p)),
            Target::Bus(_) | Target::Apic => Ok(None),
        }
    }

    /// #AC for unaligned user accesses with CR0.AM and EFLAGS.AC (SDM Vol. 3A §6.15).
    fn check_alignment(&mut self, how: How, linear: u64, size: u32) -> Exec {
        if how.mode == PRIV_USER_ALIGN && linear & (size as u64 - 1) != 0 {
            return Err(self.fault_code(exception::AC, 0));
        }
        Ok(())
    }

    /// Moves bytes between `buf` and memory or the bus. All pages are checked first.
    fn transfer(&mut self, how: How, linear: u64, buf: &mut [u8]) -> Exec {
        self.transfer_unwatched(how, linear, buf)?;
        if self.boundary.data_watch {
            self.data_breakpoints(linear, buf.len() as u64, how.access == Access::Write);
        }
        Ok(())
    }

    fn transfer_unwatched(&mut self, how: How, linear: u64, buf: &mut [u8]) -> Exec {
        let first = (0x1000 - (linear & 0xfff)) as usize;
        if buf.len() <= first {
            let t = self.target(how, linear)?;
            return self.transfer_at(how, t, linear, buf);
        }
        let mask = if self.is_64() { u64::MAX } else { 0xffff_ffff };
        // Check every page before the first byte moves.
        let (mut at, mut next) = (0, first);
        while at < buf.len() {
            let linear = linear.wrapping_add(at as u64) & mask;
            if let Target::Apic = self.target(how, linear)? {
                // No access across a page boundary is virtualized.
                self.check_apic_access(how.access, linear, buf.len())?;
            }
            at = next;
            next += 0x1000;
        }
        let (mut done, mut end) = (0, first);
        while done < buf.len() {
            let lin = linear.wrapping_add(done as u64) & mask;
            let t = self.target(how, lin)?;
            self.transfer_at(how, t, lin, &mut buf[done..end])?;
            done = end;
            end = (end + 0x1000).min(buf.len());
        }
        Ok(())
    }

    /// Moves bytes that lie within one page.
    fn transfer_at(&mut self, how: How, target: Target, linear: u64, buf: &mut [u8]) -> Exec {
        match target {
            Target::Memory(p) if how.access == Access::Write => {
                let machine = p as u64 - self.mmu.mem_base;
                let page = machine >> 12;
                if self.memory.is_code_page(page) {
                    self.code_write(machine, buf.len() as u64)?;
                }
                self.memory.mark_dirty(page);
                // SAFETY: `target` returned a pointer into machine memory with the rest of its
                // page behind it, and the caller stays within the page.
                unsafe { copy_to(p, buf) };
                Ok(())
            }
            Target::Memory(p) => {
                // SAFETY: as above.
                unsafe { copy_from(p, buf) };
                Ok(())
            }
            Target::Bus(gpa) => {
                self.bus_access(how.access, gpa, buf);
                Ok(())
            }
            Target::Apic => {
                self.check_apic_access(how.access, linear, buf.len())?;
                if how.access != Access::Write {
                    self.apic_page_read(linear, buf);
                    return Ok(());
                }
                // What the write causes comes right after its instruction, which so must run alone.
                self.require_alone()?;
                self.apic_page_write(linear, buf);
                Ok(())
            }
        }
    }

    /// Whether there is an exit bus, and this address is on it.
    fn bus_has(&mut self, access: Access, gpa: u64) -> bool {
        let Some(bus) = self.bus else { return false };
        // SAFETY: as in `bus_access`.
        unsafe { &mut *bus }.is_device(Gpa(gpa), access == Access::Write)
    }

    /// Splits an access into naturally sized pieces on the exit bus.
    fn bus_access(&mut self, access: Access, gpa: u64, buf: &mut [u8]) {
        let Some(bus) = self.bus else { return };
        // SAFETY: `bus` is set only by `Vcpu::emulate` for the time of that call, from a
        // reference that lives at least as long.
        let bus = unsafe { &mut *bus };
        let mut at = 0;
        while at < buf.len() {
            let left = buf.len() - at;
            let size = [8, 4, 2, 1].into_iter().find(|s| *s <= left).unwrap_or(1);
            let addr = Gpa(gpa + at as u64);
            if access == Access::Write {
                let mut b = [0; 8];
                b[..size].copy_from_slice(&buf[at..at + size]);
                bus.mmio_write(addr, size as u8, u64::from_le_bytes(b));
            } else {
                let v = bus.mmio_read(addr, size as u8).to_le_bytes();
                buf[at..at + size].copy_from_slice(&v[..size]);
            }
            at += size;
        }
    }

    // ---- segmentation --------------------------------------------------------------------

    /// Linear address of `offset` in a segment after the checks of an access of `size`
    /// bytes (SDM Vol. 3A §5.3, §5.5; Vol. 1 §3.3.7).
    ///
    /// # Errors
    /// #GP(0), for the stack segment #SS(0).
    pub fn segment_linear(&mut self, segment: usize, offset: u64, size: u32, access: Access) -> Exec<u64> {
        let vector = if segment == seg::SS { exception::SS } else { exception::GP };
        if self.is_64() {
            let base = if segment == seg::FS || segment == seg::GS { self.segments[segment].base } else { 0 };
            let linear = base.wrapping_add(offset);
            if !canonical(linear) || !canonical(linear.wrapping_add(size.max(1) as u64 - 1)) {
                return Err(self.fault_code(vector, 0));
            }
            return Ok(linear);
        }
        let s = self.segments[segment];
        let a = s.access;
        let last = offset.wrapping_add(size.max(1) as u64 - 1);
        let bad_type = !self.real_or_v86()
            && (a.unusable()
                || match access {
                    Access::Write => a.is_code() || !a.read_write(),
                    Access::Read => a.is_code() && !a.read_write(),
                    Access::Fetch => false,
                });
        let outside = if a.expand_down() {
            let top = if a.db() { 0xffff_ffff } else { 0xffff };
            offset <= s.limit as u64 || last > top
        } else {
            last > s.limit as u64
        };
        if bad_type || outside {
            return Err(self.fault_code(vector, 0));
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }

    // ---- translation -----------------------------------------------------------------------

    /// Machine address of the instruction byte at `linear`, for fetching at the current
    /// privilege.
    ///
    /// # Errors
    /// #PF, #GP(0), VM exits.
    #[inline]
    pub fn fetch_address(&mut self, linear: u64) -> Exec<MachineAddr> {
        let e = &self.mmu.tlb[((linear >> 12) ^ self.ctx) as usize & (TLB_ENTRIES - 1)];
        if e.fetch == linear & !0xfff | self.ctx {
            return Ok(MachineAddr(linear.wrapping_add(e.addend) - self.mmu.mem_base));
        }
        self.fetch_slow(linear)
    }

    #[cold]
    fn fetch_slow(&mut self, linear: u64) -> Exec<MachineAddr> {
        match self.target(How { access: Access::Fetch, mode: self.ctx & 3 }, linear)? {
            Target::Memory(p) => Ok(MachineAddr(p as u64 - self.mmu.mem_base)),
            // Code in device memory can't be executed; L0 sees the violation.
            Target::Bus(gpa) => Err(self.exit(VmExit {
                guest_physical: Gpa(gpa),
                guest_linear: linear,
                ..VmExit::new(ExitReason::EptViolation)
                    .qualified(ept_violation::FETCH | ept_violation::LINEAR_VALID | ept_violation::TRANSLATED)
            })),
            Target::Apic => {
                self.check_apic_access(Access::Fetch, linear, 1)?;
                Err(Stop(()))
            }
        }
    }

    /// Translates one address for one access and caches the result.
    fn target(&mut self, how: How, linear: u64) -> Exec<Target> {
        if self.code_size == CodeSize::Bits64 && !canonical(linear) {
            self.mmu.noncanonical = true;
            return Err(self.gp(0));
        }
        let page = linear & !0xfff;
        let context = (self.ctx >> 2) as u16;
        let cached = self
            .mmu
            .second_lookup(page, context)
            .or_else(|| self.mmu.second_lookup(page, self.mmu.global_context));
        let t = match cached {
            Some(t)
                if self.allowed(t.flags, how)
                    && (how.access != Access::Write || t.flags & tf::DIRTY != 0) =>
            {
                t
            }
            _ => match self.walk(how, linear)? {
                Ok(t) => {
                    self.remember(page, context, t);
                    t
                }
                Err(other) => return Ok(other),
            },
        };
        self.fill(how, page, t);
        Ok(Target::Memory(self.mmu.host(t.machine | linear & 0xfff)))
    }

    /// Puts a translation into the second-level TLB.
    fn remember(&mut self, page: u64, context: u16, t: Translation) {
        if t.flags & tf::LARGE_1G != 0 {
            self.mmu.note_large(page >> 30 | 1 << 60);
        } else if t.flags & tf::LARGE_2M != 0 {
            self.mmu.note_large(page >> 21);
        }
        let global = t.flags & tf::GLOBAL != 0;
        let c = if global { self.mmu.global_context } else { context };
        self.mmu.second_insert(page, c, t);
    }

    /// Puts a translation into the fast TLB, with the tags that its rights allow.
    fn fill(&mut self, how: How, page: u64, t: Translation) {
        if how.mode == PRIV_USER_ALIGN || self.boundary.data_watch {
            return;
        }
        let ctx = self.ctx & !3 | how.mode;
        let machine_page = t.machine >> 12;
        let check = |access| self.allowed(t.flags, How { access, mode: how.mode });
        let tag = page | ctx;
        let writable =
            check(Access::Write) && t.flags & tf::DIRTY != 0 && !self.memory.is_code_page(machine_page);
        let entry = TlbEntry {
            read: if check(Access::Read) { tag } else { INVALID },
            write: if writable { tag } else { INVALID },
            fetch: if check(Access::Fetch) { tag } else { INVALID },
            addend: (self.mmu.mem_base + t.machine).wrapping_sub(page),
        };
        if writable {
            self.memory.mark_dirty(machine_page);
        }
        self.mmu.tlb[((page >> 12) ^ ctx) as usize & (TLB_ENTRIES - 1)] = entry;
    }

    /// Access rights (SDM Vol. 3A §4.6, Vol. 3C §29.3.3).
    fn allowed(&self, flags: u16, how: How) -> bool {
        let has = |f| flags & f != 0;
        let user = how.user();
        match how.access {
            Access::Read => has(tf::EPT_R) && self.data_allowed(flags, how, user),
            Access::Write => {
                has(tf::EPT_W)
                    && self.data_allowed(flags, how, user)
                    && (has(tf::WRITE) || !user && self.cr0 & cr0::WP == 0)
            }
            Access::Fetch => {
                has(tf::EPT_X)
                    && !has(tf::XD)
                    && if user { has(tf::USER) } else { !(has(tf::USER) && self.smep()) }
            }
        }
    }

    fn data_allowed(&self, flags: u16, how: How, user: bool) -> bool {
        let user_page = flags & tf::USER != 0;
        if user { user_page } else { !(user_page && how.mode == PRIV_SUPERVISOR && self.smap()) }
    }

    fn smep(&self) -> bool {
        self.cr4 & cr4::SMEP != 0 && self.cr0 & cr0::PG != 0
    }
    fn smap(&self) -> bool {
        self.cr4 & cr4::SMAP != 0 && self.cr0 & cr0::PG != 0
    }

    /// The page walk of the current paging mode. `Ok(Err(_))`: the page is not memory.
    fn walk(&mut self, how: How, linear: u64) -> Exec<Result<Translation, Target>> {
        self.mmu.walks += 1;
        if self.cr0 & cr0::PG == 0 {
            let all = tf::USER | tf::WRITE;
            return self.finish_walk(how, linear, linear & 0xffff_ffff, all, true);
        }
        loop {
            let walked = if self.efer & efer::LMA != 0 {
                self.walk_64(how, linear, 3, self.cr3 & ENTRY_ADDR, true)?
            } else if self.cr4 & cr4::PAE != 0 {
                self.walk_pae(how, linear)?
            } else {
                self.walk_32(how, linear)?
            };
            // `None`: an entry changed under the walk; do it again.
            if let Some((gpa, flags)) = walked {
                let dirty = flags & tf::DIRTY != 0;
                return self.finish_walk(how, linear, gpa, flags & !tf::DIRTY, dirty);
            }
        }
    }

    /// PAE paging (SDM Vol. 3A §4.4): the PDPTE registers, then two levels.
    fn walk_pae(&mut self, how: How, linear: u64) -> Exec<Option<(u64, u16)>> {
        let pdpte = self.pdptes[(linear >> 30 & 3) as usize];
        if pdpte & pte::P == 0 {
            return Err(self.paging_fault(how, linear, 0));
        }
        self.walk_64(how, linear, 1, pdpte & ENTRY_ADDR, false)
    }

    /// 8-byte entries from `level` (3 = PML4) down (SDM Vol. 3A §4.5).
    fn walk_64(
        &mut self,
        how: How,
        linear: u64,
        level: u32,
        root: u64,
        long: bool,
    ) -> Exec<Option<(u64, u16)>> {
        let nxe = self.efer & efer::NXE != 0;
        let mut table = root;
        let mut flags = tf::USER | tf::WRITE;
        let mut level = level;
        let mut path = [(0u64, 0u64); 4];
        loop {
            let shift = 12 + 9 * level;
            let at = table + (linear >> shift & 511) * 8;
            let entry = self.read_paging_entry(linear, at, 8)?;
            path[level as usize] = (at, entry);
            if entry & pte::P == 0 {
                return Err(self.paging_fault(how, linear, 0));
            }
            let leaf = level == 0 || entry & pte::PS != 0 && (level == 1 || level == 2 && long);
            let mut reserved = RESERVED_ADDR;
            if !nxe {
                reserved |= pte::XD;
            }
            if !long {
                reserved |= 0x7ff0_0000_0000_0000;
            }
            if level == 3 {
                reserved |= pte::PS;
            }
            if leaf && level > 0 {
                // Bits between the PAT bit (12) and the page's base.
                reserved |= ((1 << shift) - 1) & !0x1fff;
            }
            if entry & reserved != 0 {
                return Err(self.paging_fault(how, linear, pf::P | pf::RSVD));
            }
            if entry & pte::U == 0 {
                flags &= !tf::USER;
            }
            if entry & pte::W == 0 {
                flags &= !tf::WRITE;
            }
            if entry & pte::XD != 0 {
                flags |= tf::XD;
            }
            if !leaf {
                table = entry & ENTRY_ADDR;
                level -= 1;
                continue;
            }
            match level {
                1 => flags |= tf::LARGE_2M,
                2 => flags |= tf::LARGE_1G,
                _ => {}
            }
            if entry & pte::G != 0 && self.cr4 & cr4::PGE != 0 {
                flags |= tf::GLOBAL;
            }
            if !self.allowed(flags | tf::EPT_R | tf::EPT_W | tf::EPT_X, how) {
                return Err(self.paging_fault(how, linear, pf::P));
            }
            let write = how.access == Access::Write;
            let top = if long { 3 } else { 1 };
            for l in (level..=top).rev() {
                let (at, entry) = path[l as usize];
                let want = pte::A | if l == level && write { pte::D } else { 0 };
                if entry & want != want && !self.set_paging_bits(linear, at, entry, want, 8)? {
                    return Ok(None);
                }
            }
            if entry & pte::D != 0 || write {
                flags |= tf::DIRTY;
            }
            let page_mask = (1u64 << shift) - 1;
            return Ok(Some((entry & ENTRY_ADDR & !page_mask | linear & page_mask, flags)));
        }
    }

    /// 32-bit paging (SDM Vol. 3A §4.3) with 4 MiB pages and PSE-36.
    fn walk_32(&mut self, how: How, linear: u64) -> Exec<Option<(u64, u16)>> {
        let pde_at = (self.cr3 & 0xffff_f000) + (linear >> 22 & 1023) * 4;
        let pde = self.read_paging_entry(linear, pde_at, 4)?;
        if pde & pte::P == 0 {
            return Err(self.paging_fault(how, linear, 0));
        }
        let mut flags = tf::USER | tf::WRITE;
        let narrow = |entry: u64, flags: &mut u16| {
            if entry & pte::U == 0 {
                *flags &= !tf::USER;
            }
            if entry & pte::W == 0 {
                *flags &= !tf::WRITE;
            }
        };
        narrow(pde, &mut flags);
        let large = pde & pte::PS != 0 && self.cr4 & cr4::PSE != 0;
        let (leaf_at, leaf) = if large {
            // Bit 21 is reserved; bits 20:13 are address bits 39:32.
            if pde & 1 << 21 != 0 {
                return Err(self.paging_fault(how, linear, pf::P | pf::RSVD));
            }
            flags |= tf::LARGE_2M;
            (pde_at, pde)
        } else {
            let at = (pde & 0xffff_f000) + (linear >> 12 & 1023) * 4;
            let e = self.read_paging_entry(linear, at, 4)?;
            if e & pte::P == 0 {
                return Err(self.paging_fault(how, linear, 0));
            }
            narrow(e, &mut flags);
            (at, e)
        };
        if leaf & pte::G != 0 && self.cr4 & cr4::PGE != 0 {
            flags |= tf::GLOBAL;
        }
        if !self.allowed(flags | tf::EPT_R | tf::EPT_W | tf::EPT_X, how) {
            return Err(self.paging_fault(how, linear, pf::P));
        }
        let write = how.access == Access::Write;
        if !large && pde & pte::A == 0 && !self.set_paging_bits(linear, pde_at, pde, pte::A, 4)? {
            return Ok(None);
        }
        let want = pte::A | if write { pte::D } else { 0 };
        if leaf & want != want && !self.set_paging_bits(linear, leaf_at, leaf, want, 4)? {
            return Ok(None);
        }
        if leaf & pte::D != 0 || write {
            flags |= tf::DIRTY;
        }
        let gpa = if large {
            pde & 0xffc0_0000 | (pde >> 13 & 0xff) << 32 | linear & 0x3f_ffff
        } else {
            leaf & 0xffff_f000 | linear & 0xfff
        };
        Ok(Some((gpa, flags)))
    }

    /// #PF with the error code of SDM Vol. 3A §4.7.
    fn paging_fault(&mut self, how: How, linear: u64, bits: u32) -> Stop {
        let mut code = bits;
        if how.access == Access::Write {
            code |= pf::W;
        }
        if how.user() {
            code |= pf::U;
        }
        let nx = self.efer & efer::NXE != 0 && (self.cr4 & cr4::PAE != 0);
        if how.access == Access::Fetch && (nx || self.cr4 & cr4::SMEP != 0) {
            code |= pf::I;
        }
        self.page_fault(linear, code)
    }

    /// Last step of a walk: the page itself through EPT.
    fn finish_walk(
        &mut self,
        how: How,
        linear: u64,
        gpa: u64,
        flags: u16,
        dirty: bool,
    ) -> Exec<Result<Translation, Target>> {
        // Under mode-based execute control a fetch needs the right of its linear address's mode
        // (SDM Vol. 3C §29.3.3.2); without it the walk gives both the same value.
        let execute = if flags & tf::USER != 0 { ept::XU } else { ept::X };
        let access = match how.access {
            Access::Read => ept::R,
            Access::Write => ept::W,
            Access::Fetch => execute,
        };
        match self.ept_lookup(gpa & !0xfff, access) {
            Ok((machine, _)) if self.is_apic_page(machine) => Ok(Err(Target::Apic)),
            Ok((machine, rights)) => {
                if !self.mmu.is_memory(machine, 0x1000) {
                    return if self.bus.is_some() {
                        Ok(Err(Target::Bus(gpa)))
                    } else {
                        Err(self.no_memory(gpa, linear))
                    };
                }
                let mut f = flags;
                for (bit, flag) in [(ept::R, tf::EPT_R), (ept::W, tf::EPT_W), (execute, tf::EPT_X)] {
                    if rights & bit != 0 {
                        f |= flag;
                    }
                }
                if dirty {
                    f |= tf::DIRTY;
                }
                Ok(Ok(Translation { machine, flags: f }))
            }
            Err(miss) if miss.violation && how.access != Access::Fetch && self.bus_has(how.access, gpa) => {
                Ok(Err(Target::Bus(gpa)))
            }
            Err(mut miss) => {
                miss.exit.guest_linear = linear;
                miss.exit.guest_physical = Gpa(gpa);
                if miss.violation {
                    miss.exit.qualification |=
                        ept_violation::LINEAR_VALID | ept_violation::TRANSLATED | advanced_information(flags);
                }
                Err(self.exit(miss.exit))
            }
        }
    }

    /// An EPT leaf (or, without EPT, the guest) names machine memory that does not exist.
    fn no_memory(&mut self, gpa: u64, linear: u64) -> Stop {
        self.exit(VmExit {
            guest_physical: Gpa(gpa),
            guest_linear: linear,
            ..VmExit::new(ExitReason::EptMisconfiguration)
        })
    }

    /// Reads a guest paging-structure entry of `size` bytes at guest-physical `gpa`.
    fn read_paging_entry(&mut self, linear: u64, gpa: u64, size: u64) -> Exec<u64> {
        // With EPT accessed and dirty flags these reads count as writes (SDM Vol. 3C §29.3.3.2).
        let ad = self.ept_on() && self.mmu.current.eptp & ept::EPTP_AD != 0;
        let access = if ad { ept::R | ept::W } else { ept::R };
        let machine = self.paging_entry_address(linear, gpa, access)?;
        let p = self.mmu.host(machine);
        // SAFETY: `paging_entry_address` returned an address inside machine memory, aligned as
        // tables are; other threads access it only atomically or by raw copies.
        Ok(unsafe {
            if size == 8 {
                AtomicU64::from_ptr(p.cast()).load(Ordering::Acquire)
            } else {
                AtomicU32::from_ptr(p.cast()).load(Ordering::Acquire) as u64
            }
        })
    }

    /// Sets accessed and dirty bits in an entry unless it changed since it was read; false
    /// if it did.
    fn set_paging_bits(&mut self, linear: u64, gpa: u64, old: u64, bits: u64, size: u64) -> Exec<bool> {
        let machine = self.paging_entry_address(linear, gpa, ept::R | ept::W)?;
        let p = self.mmu.host(machine);
        // SAFETY: as in `read_paging_entry`.
        let done = unsafe {
            if size == 8 {
                let a = AtomicU64::from_ptr(p.cast());
                a.compare_exchange(old, old | bits, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            } else {
                let a = AtomicU32::from_ptr(p.cast());
                a.compare_exchange(old as u32, (old | bits) as u32, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            }
        };
        if done {
            self.memory.written(MachineAddr(machine), size);
        }
        Ok(done)
    }

    fn paging_entry_address(&mut self, linear: u64, gpa: u64, access: u64) -> Exec<u64> {
        match self.ept_lookup(gpa & !0xfff, access) {
            // Without EPT the walk goes to what is behind the page (SDM Vol. 3C §30.4.6.2).
            Ok((machine, _)) if self.ept_on() && self.is_apic_page(machine) => {
                Err(self.physical_apic_access())
            }
            Ok((machine, _)) if self.mmu.is_memory(machine, 0x1000) => Ok(machine | gpa & 0xfff),
            Ok(_) => Err(self.no_memory(gpa, linear)),
            Err(mut miss) => {
                miss.exit.guest_linear = linear;
                miss.exit.guest_physical = Gpa(gpa);
                if miss.violation {
                    miss.exit.qualification |= ept_violation::LINEAR_VALID;
                }
                Err(self.exit(miss.exit))
            }
        }
    }

    /// Guest-physical page to machine page, with the rights of the path. Cached.
    fn ept_lookup(&mut self, gpa: u64, access: u64) -> Result<(u64, u64), EptMiss> {
        if !self.ept_on() {
            return Ok((gpa, ept::RWX | ept::XU));
        }
        let eptp = self.mmu.current.eptp;
        let i = (gpa >> 12) as usize & (EPT_ENTRIES - 1);
        let e = self.mmu.ept_cache[i];
        if e.gpa == gpa && e.eptp == eptp && e.rights & access == access {
            return Ok((e.machine, e.rights));
        }
        let (machine, rights) = self.ept_walk(eptp, gpa, access)?;
        self.mmu.ept_cache[i] = EptCacheEntry { gpa, eptp, machine, rights };
        Ok((machine, rights))
    }

    /// The EPT walk (SDM Vol. 3C §29.3.2): page of machine memory and effective rights, in
    /// which XU stands for X where there is no mode-based execute control.
    fn ept_walk(&mut self, eptp: u64, gpa: u64, access: u64) -> Result<(u64, u64), EptMiss> {
        let ad = eptp & ept::EPTP_AD != 0;
        let by_mode = self.secondary(SecondaryControls::MODE_BASED_EPT);
        let present = if by_mode { ept::RWX | ept::XU } else { ept::RWX };
        let violation = |rights: u64| EptMiss {
            exit: VmExit::new(ExitReason::EptViolation).qualified(violation_bits(access, rights, by_mode)),
            violation: true,
        };
        let misconfiguration =
            || EptMiss { exit: VmExit::new(ExitReason::EptMisconfiguration), violation: false };
        if gpa >> 48 != 0 {
            return Err(violation(0));
        }
        let mut table = eptp & ept::ADDR_MASK;
        let mut rights = ept::RWX | ept::XU;
        let mut level = 3;
        let mut path = [MachineAddr(0); 4];
        loop {
            let shift = 12 + 9 * level;
            let at = MachineAddr(table + (gpa >> shift & 511) * 8);
            let Ok(cell) = self.memory.atomic_u64(at) else { return Err(misconfiguration()) };
            let entry = cell.load(Ordering::Acquire);
            path[level as usize] = at;
            rights &= if by_mode || entry & ept::X == 0 { entry } else { entry | ept::XU };
            if !by_mode && entry & ept::X == 0 {
                rights &= !ept::XU;
            }
            if entry & present == 0 {
                return Err(violation(0));
            }
            let leaf = level == 0 || entry & ept::LARGE != 0 && level <= 2;
            if ept_misconfigured(entry, level, leaf) {
                return Err(misconfiguration());
            }
            if !leaf {
                table = entry & ept::ADDR_MASK;
                level -= 1;
                continue;
            }
            if rights & access != access {
                return Err(violation(rights));
            }
            if ad {
                let write = access & ept::W != 0;
                if write && entry & ept::D == 0 {
                    self.log_page_modification(gpa)?;
                }
                for (l, at) in path.iter().enumerate().skip(level as usize) {
                    let want = ept::A | if write && l == level as usize { ept::D } else { 0 };
                    if let Ok(cell) = self.memory.atomic_u64(*at)
                        && cell.load(Ordering::Acquire) & want != want
                    {
                        cell.fetch_or(want, Ordering::AcqRel);
                    }
                }
                if !write && entry & ept::D == 0 {
                    rights &= !ept::W;
                }
            }
            let mask = (1u64 << shift) - 1;
            return Ok((entry & ept::ADDR_MASK & !mask | gpa & mask & !0xfff, rights));
        }
    }

    /// Page-modification logging (SDM Vol. 3C §29.3.6): before a dirty flag is set, the page goes to
    /// the log; with the log full, the access exits instead.
    fn log_page_modification(&mut self, gpa: u64) -> Result<(), EptMiss> {
        if !self.secondary(SecondaryControls::ENABLE_PML) {
            return Ok(());
        }
        if self.pml_index > 511 {
            return Err(EptMiss { exit: VmExit::new(ExitReason::PmlFull), violation: false });
        }
        let at = self.controls.pml.offset(self.pml_index as u64 * 8);
        // An address outside memory was refused when L0 checked the VMCS; here it goes nowhere.
        let _ = self.memory.write_u64(at, gpa & !0xfff);
        self.pml_index = self.pml_index.wrapping_sub(1);
        Ok(())
    }

    /// Side-effect-free translation for L0 (debuggers): guest-physical address.
    pub fn peek_translate(&self, linear: u64) -> Option<u64> {
        if self.cr0 & cr0::PG == 0 {
            return Some(linear & 0xffff_ffff);
        }
        let read = |gpa: u64, size: usize| -> Option<u64> {
            let machine = self.peek_ept(gpa)?;
            let mut b = [0; 8];
            self.memory.read(MachineAddr(machine), b.get_mut(..size)?).ok()?;
            Some(u64::from_le_bytes(b))
        };
        if self.efer & efer::LMA == 0 && self.cr4 & cr4::PAE == 0 {
            let pde = read((self.cr3 & 0xffff_f000) + (linear >> 22 & 1023) * 4, 4)?;
            if pde & pte::P == 0 {
                return None;
            }
            if pde & pte::PS != 0 && self.cr4 & cr4::PSE != 0 {
                return Some(pde & 0xffc0_0000 | linear & 0x3f_ffff);
            }
            let e = read((pde & 0xffff_f000) + (linear >> 12 & 1023) * 4, 4)?;
            return (e & pte::P != 0).then_some(e & 0xffff_f000 | linear & 0xfff);
        }
        let (mut level, mut table) = if self.efer & efer::LMA != 0 {
            (3, self.cr3 & ENTRY_ADDR)
        } else {
            let p = self.pdptes[(linear >> 30 & 3) as usize];
            if p & pte::P == 0 {
                return None;
            }
            (1, p & ENTRY_ADDR)
        };
        loop {
            let shift = 12 + 9 * level;
            let e = read(table + (linear >> shift & 511) * 8, 8)?;
            if e & pte::P == 0 {
                return None;
            }
            if level == 0 || e & pte::PS != 0 && level < 3 {
                let mask = (1u64 << shift) - 1;
                return Some(e & ENTRY_ADDR & !mask | linear & mask);
            }
            table = e & ENTRY_ADDR;
            level -= 1;
        }
    }

    /// Side-effect-free EPT translation.
    fn peek_ept(&self, gpa: u64) -> Option<u64> {
        let eptp = self.space_key().eptp;
        if eptp == 0 {
            return Some(gpa);
        }
        let mut table = eptp & ept::ADDR_MASK;
        for level in (0..4).rev() {
            let shift = 12 + 9 * level;
            let e = self.memory.read_u64(MachineAddr(table + (gpa >> shift & 511) * 8)).ok()?;
            if e & ept::RWX == 0 {
                return None;
            }
            if level == 0 || e & ept::LARGE != 0 && level < 3 {
                let mask = (1u64 << shift) - 1;
                return Some(e & ept::ADDR_MASK & !mask | gpa & mask);
            }
            table = e & ept::ADDR_MASK;
        }
        None
    }

    /// Loads the PDPTE registers from the table at `cr3` (SDM Vol. 3A §4.4.1).
    ///
    /// # Errors
    /// #GP(0) when a present entry has a reserved bit set; VM exits.
    pub fn load_pdptes(&mut self, cr3: u64) -> Exec {
        let base = cr3 & 0xffff_ffe0;
        let mut loaded = [0; 4];
        for (i, slot) in loaded.iter_mut().enumerate() {
            let e = match self.read_paging_entry(0, base + i as u64 * 8, 8) {
                Ok(e) => e,
                Err(stop) => {
                    // No linear address leads here (SDM Vol. 3C table 28-7, bit 7).
                    if let Reason::Exit(exit) = &mut self.reason {
                        exit.qualification &= !ept_violation::LINEAR_VALID;
                    }
                    return Err(stop);
                }
            };
            if e & pte::P != 0 && e & (RESERVED_ADDR | 0xfff0_0000_0000_01e6) != 0 {
                return Err(self.gp(0));
            }
            *slot = e;
        }
        self.pdptes = loaded;
        Ok(())
    }
}

impl Mmu {
    /// Forgets the non-global translations of one PCID.
    fn spaces_flush_non_global(&mut self, vpid: u16, eptp: u64, pcid: u16) {
        self.renumber(|k| k.vpid == vpid && k.eptp == eptp && k.pcid == pcid);
    }
    /// Forgets the non-global translations of all PCIDs of a VPID.
    fn spaces_flush_all_non_global(&mut self, vpid: u16, eptp: u64) {
        self.renumber(|k| k.vpid == vpid && k.eptp == eptp);
    }

    /// Gives the selected spaces new context numbers; their globals stay.
    fn renumber(&mut self, which: impl Fn(&SpaceKey) -> bool) {
        if self.next_context as usize + self.spaces.len() + 2 > LAST_CONTEXT as usize {
            return self.clear();
        }
        for s in self.spaces.iter_mut().filter(|s| which(&s.key)) {
            s.context = self.next_context;
            self.next_context += 1;
        }
    }
}

/// Access and permission bits of an EPT-violation qualification (SDM Vol. 3C table 28-7, bits 6:0).
fn violation_bits(access: u64, rights: u64, by_mode: bool) -> u64 {
    let fetch = access & (ept::X | ept::XU) != 0;
    access & (ept::R | ept::W)
        | if fetch { ept_violation::FETCH } else { 0 }
        | (rights & ept::RWX) << 3
        | if by_mode && rights & ept::XU != 0 { ept_violation::USER_EXECUTABLE } else { 0 }
}

/// Advanced EPT-violation information: what the guest's paging says of the page (SDM Vol. 3C
/// table 28-7, bits 11:9). Without paging a page counts as user-mode, writable, executable.
fn advanced_information(flags: u16) -> u64 {
    let bit = |flag, q| if flags & flag != 0 { q } else { 0 };
    bit(tf::USER, ept_violation::USER_LINEAR)
        | bit(tf::WRITE, ept_violation::GUEST_WRITABLE)
        | bit(tf::XD, ept_violation::GUEST_XD)
}

/// EPT misconfigurations (SDM Vol. 3C §29.3.3.1).
fn ept_misconfigured(entry: u64, level: u32, leaf: bool) -> bool {
    if entry & (ept::R | ept::W) == ept::W || entry & RESERVED_ADDR != 0 {
        return true;
    }
    if !leaf {
        // Bits 6:3 (and 7 in a PML4E) are reserved in entries that reference a table.
        return entry & 0x78 != 0 || level == 3 && entry & ept::LARGE != 0;
    }
    let memtype = entry >> ept::MEMTYPE_SHIFT & 7;
    let low_address = ((1u64 << (12 + 9 * level)) - 1) & !0xfff;
    matches!(memtype, 2 | 3 | 7) || entry & low_address != 0
}

/// Copies to machine memory; single accesses for the sizes that the architecture makes
/// atomic.
///
/// # Safety
/// `p` is valid for `buf.len()` bytes.
unsafe fn copy_to(p: *mut u8, buf: &[u8]) {
    // SAFETY: the caller's contract.
    unsafe {
        match *buf {
            [a] => ptr::write_volatile(p, a),
            [a, b] => ptr::write_unaligned(p.cast(), u16::from_le_bytes([a, b])),
            [a, b, c, d] => ptr::write_unaligned(p.cast(), u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                ptr::write_unaligned(p.cast(), u64::from_le_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => ptr::copy_nonoverlapping(buf.as_ptr(), p, buf.len()),
        }
    }
}

/// Copies from machine memory.
///
/// # Safety
/// `p` is valid for `buf.len()` bytes.
unsafe fn copy_from(p: *const u8, buf: &mut [u8]) {
    // SAFETY: the caller's contract.
    unsafe {
        match buf.len() {
            4 => buf.copy_from_slice(&ptr::read_unaligned(p.cast::<u32>()).to_le_bytes()),
            8 => buf.copy_from_slice(&ptr::read_unaligned(p.cast::<u64>()).to_le_bytes()),
            n => ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), n),
        }
    }
}
