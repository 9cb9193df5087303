//! EPT02 kept in step with EPT12.
//!
//! With INVEPT, as a processor keeps its cached translations: L1 says when they are to go, and that is
//! all. With write-protection, L0 sees each change of a table as it happens, and INVEPT has
//! nothing to do:
//!
//! - pages of L1 that hold tables which EPT02 was composed from lose their write permission in EPT01,
//!   and so in EPT02. L1's write exits, L0 has the engine execute that one instruction, and drops what
//!   came from the entries that were written;
//! - writes of devices and of L0 itself are noticed by machine memory;
//! - a table that is written again and again without being used in between is dropped as a whole and
//!   let go until its next use;
//! - a table that L2 itself writes, or that L1's own paging structures are in, can't be protected
//!   without holding them up. It is let go until the next INVEPT.

use engine::{Engine, InvalidateScope, VmExit};
use ept_compress::Flush;
use memory::L1Gpa;
use x86_spec::exit::{ExitReason, ept_violation};

use crate::exits::Outcome;
use crate::vcpu_loop::VcpuLoop;

/// How EPT02 is kept in step with EPT12.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EptSync {
    /// When L1 executes INVEPT.
    #[default]
    Invept,
    /// At each write to a table, by write-protecting the pages that hold them.
    WriteProtect,
}

impl<E: Engine> VcpuLoop<E> {
    /// To be called after each change of EPT02: has the engine drop `flush`, and protects and
    /// releases pages.
    pub(super) fn ept02_changed(&mut self, flush: Flush) {
        let vm = self.vm().clone();
        let engine = vm.engine();
        let drop_translations = |flush| match flush {
            Flush::None => {}
            Flush::Eptp(eptp) => engine.invalidate(InvalidateScope::Eptp(eptp)),
            Flush::All => engine.invalidate(InvalidateScope::All),
        };
        drop_translations(flush);
        let Some(n) = self.nested.as_mut().filter(|n| n.sync == EptSync::WriteProtect) else { return };
        let mut ept01_changed = false;
        let mut flush = Flush::None;
        // Protecting a page can't make another change necessary, but letting one go can.
        loop {
            let changes = n.ept02.protection_changes();
            if changes.protect.is_empty() && changes.release.is_empty() {
                break;
            }
            for page in changes.release {
                ept01_changed |= released(vm.ept01().release(page));
                if !vm.ept01().is_protected(page) {
                    watch(&vm, page, false);
                }
            }
            for page in changes.protect {
                match vm.ept01().protect(page) {
                    Ok(changed) => ept01_changed |= changed,
                    Err(e) => {
                        tracing::error!("a table of L1 at {page} can't be protected: {e}");
                        flush = flush.and(n.ept02.exempt_table(page));
                        continue;
                    }
                }
                if let Some(machine) = watch(&vm, page, true) {
                    flush = flush.and(n.ept02.protect_from_l2(machine));
                }
            }
        }
        if ept01_changed {
            engine.invalidate(InvalidateScope::Eptp(vm.ept01().eptp()));
        }
        drop_translations(flush);
    }

    /// Takes note of writes to EPT12's tables that did not exit. To be called before EPT02 is relied
    /// on: before an entry with VMCS02, and by INVEPT.
    pub(super) fn take_table_writes(&mut self) {
        let vm = self.vm().clone();
        let Some(taken) = vm.memory().take_watched_writes() else { return };
        let Some(n) = self.nested.as_mut() else { return };
        let mut flush = Flush::None;
        for (at, len) in taken.writes {
            if let Some(gpa) = vm.ram().gpa_of(at) {
                flush = flush.and(n.ept02.l1_wrote(gpa, len));
            }
        }
        if taken.overflow {
            flush = flush.and(n.ept02.drop_all());
        }
        self.ept02_changed(flush);
    }

    /// An EPT violation of L1 that its write to a protected page caused, if it is that.
    pub(crate) fn write_to_table(&mut self, exit: &VmExit) -> Option<Outcome> {
        let vm = self.vm().clone();
        let gpa = L1Gpa(exit.guest_physical.0);
        if exit.qualification & ept_violation::WRITE == 0 || !vm.ept01().is_protected(gpa) {
            return None;
        }
        let of_instruction = exit.qualification & ept_violation::TRANSLATED != 0;
        if exit.idt_vectoring.is_valid() || !of_instruction {
            // Delivery of an event or a page walk: nothing that could be executed alone.
            self.let_table_go(gpa);
            return Some(Outcome::Resume);
        }
        let left = self.emulate_instruction();
        self.devices_touched();
        self.take_table_writes();
        Some(match left {
            None => Outcome::Resume,
            Some(again) if again.reason == ExitReason::EptViolation && !again.idt_vectoring.is_valid() => {
                self.let_table_go(gpa);
                self.let_table_go(L1Gpa(again.guest_physical.0));
                Outcome::Resume
            }
            Some(other) => self.dispatch_emulated(&other),
        })
    }

    /// Lets L1 write to the table at `gpa`, if it is one; what came from it is dropped.
    pub(super) fn let_table_go(&mut self, gpa: L1Gpa) {
        if let Some(n) = self.nested.as_mut() {
            let flush = n.ept02.drop_table(gpa);
            self.ept02_changed(flush);
        }
    }

    /// Lets L2 write to the table at `gpa`.
    pub(super) fn let_table_go_to_l2(&mut self, gpa: L1Gpa) {
        if let Some(n) = self.nested.as_mut() {
            let flush = n.ept02.exempt_table(gpa);
            self.ept02_changed(flush);
        }
    }
}

/// Has writes to the page of `at` noticed. The number of the page in machine memory.
fn watch<E: Engine>(vm: &crate::vm::Vm<E>, at: L1Gpa, on: bool) -> Option<u64> {
    let (machine, _) = vm.ram().translate(at)?;
    vm.memory().watch_page(machine.page(), on);
    Some(machine.page())
}

/// Whether translations have to go after a release.
fn released(result: Result<bool, memory::MemoryError>) -> bool {
    result.unwrap_or_else(|e| {
        // Nothing but its own tables can be in the way.
        tracing::error!("EPT01: {e}");
        true
    })
}
