//! Counting for the performance-monitoring unit (SDM Vol. 3B §20.2; [`engine::Pmu`] has the registers).
//!
//! Nothing is counted instruction by instruction. The run loop counts all instructions anyway, and the
//! TSC counts time; a counter gets the difference since it was last brought up to date: at VM exits,
//! at RDPMC, and, where counters tell CPL 0 from the others, at each change between these. An overflow
//! is waited for with the limit of the run loop, so that its interrupt comes at the end of a block.
//!
//! Time in which the host ran something else is no cycle of the guest's, at least where it is long enough to
//! be told from the guest's own ([`AWAY_PARTS`]): else a guest's NMI watchdog could take a stopped or
//! starved program for a lockup.
//!
//! The registers are written outside the engine only: WRMSR has to exit. The interrupt request is in
//! [`engine::Pmu::interrupt`] at an exit with the reason "external interrupt", since the local APIC
//! is outside, too.

use engine::VmExit;
use engine::pmu::CounterSets;
use x86_spec::exit::ExitReason;

use super::capabilities::{host_tsc, tsc_frequency};
use crate::cpu::{Cpu, Exec};

/// The run loop looks at the clock every few thousand instructions, tens of microseconds apart. If it
/// was more than this part of a second, 2 ms, the host ran something else.
const AWAY_PARTS: u64 = 500;

/// What is counted now, and since when.
#[derive(Clone, Copy, Debug)]
pub struct Counting {
    /// Some counter counts at some privilege level.
    on: bool,
    /// What is counted depends on the privilege level.
    pub(crate) by_privilege: bool,
    /// The level that `sets` is for: CPL 1 to 3.
    user: bool,
    /// The counters that count.
    sets: CounterSets,
    /// Instructions retired up to which the counters are up to date.
    retired: u64,
    /// TSC up to which the counters are up to date.
    tsc: u64,
    /// TSC at the last look at the clock.
    seen: u64,
    /// [`Cpu::icount`] at which a counter of instructions overflows.
    pub(crate) limit: u64,
    /// TSC at which a counter of cycles overflows.
    deadline: u64,
    /// Instructions in [`Cpu::icount`] that did not retire: parts of repeated ones.
    not_retired: u64,
}

impl Default for Counting {
    /// Nothing is counted.
    fn default() -> Self {
        Self {
            on: false,
            by_privilege: false,
            user: false,
            sets: CounterSets::default(),
            retired: 0,
            tsc: 0,
            seen: 0,
            limit: u64::MAX,
            deadline: u64::MAX,
            not_retired: 0,
        }
    }
}

impl Counting {
    /// A look at the clock, at `now`. Moves what is to come past the time that was not the guest's.
    fn look(&mut self, now: u64) {
        let since = now.saturating_sub(self.seen);
        self.seen = now;
        if since > tsc_frequency() / AWAY_PARTS {
            self.tsc = self.tsc.saturating_add(since);
            self.deadline = self.deadline.saturating_add(since);
        }
    }
}

impl Cpu {
    /// Starts to count as the registers say.
    pub(crate) fn start_counting(&mut self) {
        if self.perf_global_ctrl == 0 {
            return;
        }
        let (os, user) = (self.counters_running(false), self.counters_running(true));
        if os.is_empty() && user.is_empty() {
            return;
        }
        self.counting.on = true;
        self.counting.by_privilege = os != user;
        self.count_from(self.retired());
    }

    /// Brings the counters up to date and stops.
    pub(crate) fn stop_counting(&mut self) {
        if self.counting.on {
            self.count_until(self.retired());
            self.counting = Counting { not_retired: self.counting.not_retired, ..Counting::default() };
        }
    }

    /// `n` instructions were counted that will be again.
    pub(crate) fn not_retired(&mut self, n: u64) {
        self.counting.not_retired = self.counting.not_retired.wrapping_add(n);
    }

    /// The counter that RDPMC reads with `ecx`, in front of that instruction, which ends its block.
    pub(super) fn performance_counter(&mut self, ecx: u32) -> Option<u64> {
        if self.counting.on {
            let before = self.retired().wrapping_sub(1);
            self.count_until(before);
            self.count_from(before);
        }
        self.pmu.read_counter(ecx)
    }

    /// CPL may have changed while counters care. An instruction that changes it counts where it began.
    #[cold]
    pub(crate) fn privilege_changed(&mut self) {
        if (self.cpl > 0) != self.counting.user {
            let now = self.retired();
            self.count_until(now);
            self.count_from(now);
        }
    }

    fn retired(&self) -> u64 {
        self.icount.wrapping_sub(self.counting.not_retired)
    }

    fn counters_running(&self, user: bool) -> CounterSets {
        self.pmu.running(self.perf_global_ctrl, user)
    }

    /// Counts what happened up to the instruction with this number.
    fn count_until(&mut self, retired: u64) {
        let c = &mut self.counting;
        if c.sets.instructions != 0 {
            self.pmu.count(c.sets.instructions, retired.wrapping_sub(c.retired));
        }
        if c.sets.cycles != 0 {
            let now = host_tsc();
            c.look(now);
            self.pmu.count(c.sets.cycles, now.saturating_sub(c.tsc));
        }
        if self.pmu.interrupt {
            self.request_event_check();
        }
    }

    /// Counts from here, at the present privilege level.
    fn count_from(&mut self, retired: u64) {
        let user = self.cpl > 0;
        let sets = self.counters_running(user);
        let tsc = if sets.cycles != 0 { host_tsc() } else { 0 };
        let limit = self.icount.saturating_add(self.pmu.room(sets.instructions));
        let deadline = tsc.saturating_add(self.pmu.room(sets.cycles));
        self.counting = Counting { user, sets, retired, tsc, seen: tsc, limit, deadline, ..self.counting };
        // Others lower the limit, too: it is never raised here.
        self.shared.limit.fetch_min(limit, std::sync::atomic::Ordering::SeqCst);
    }
}

/// Counters that overflowed: the exit that brings their interrupt to the local APIC.
pub(super) fn overflow(cpu: &mut Cpu) -> Exec {
    let c = &mut cpu.counting;
    if !c.on {
        return Ok(());
    }
    let mut due = cpu.icount >= c.limit;
    if c.sets.cycles != 0 {
        let now = host_tsc();
        c.look(now);
        due |= now >= c.deadline;
    }
    if due {
        let now = cpu.retired();
        cpu.count_until(now);
        cpu.count_from(now);
    }
    if cpu.pmu.interrupt {
        return Err(cpu.exit(VmExit::new(ExitReason::ExternalInterrupt)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::system::testutil::{CODE, DATA, Guest, STACK, handler};
    use x86_spec::controls::{EntryControls, ExitControls, PrimaryControls};
    use x86_spec::exception;
    use x86_spec::pmu::{COUNTER, event_select};
    use x86_spec::reg::{cr4, gpr};

    /// A guest whose IA32_PERF_GLOBAL_CTRL and IA32_FIXED_CTR_CTRL have these values.
    fn counting(mut g: Guest, global: u64, fixed: u64) -> Guest {
        g.vmcs.controls.entry |= EntryControls::LOAD_IA32_PERF_GLOBAL_CTRL;
        g.vmcs.controls.exit |= ExitControls::LOAD_IA32_PERF_GLOBAL_CTRL;
        g.vmcs.guest.perf_global_ctrl = global;
        g.regs.pmu.fixed_control = fixed;
        g
    }

    /// Instructions at any CPL, with an interrupt at overflow.
    const INSTRUCTIONS: (u64, u64) = (1 << 32, 0xb);

    #[test]
    fn a_loop_is_counted_exactly() {
        #[rustfmt::skip]
        let code = [
            0xb9, 0x00, 0x00, 0x00, 0x40, // mov ecx, 40000000h
            0x0f, 0x33,                   // rdpmc
            0x49, 0x89, 0xc0,             // mov r8, rax
            0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
            0xff, 0xc9,                   // dec ecx
            0x75, 0xfc,                   // jnz -4
            0xb9, 0x00, 0x00, 0x00, 0x40, // mov ecx, 40000000h
            0x0f, 0x33,                   // rdpmc
            0x90, 0x90, 0x90,             // nop
            0x0f, 0x01, 0xc1,             // vmcall
        ];
        let mut g = counting(Guest::long(&code), INSTRUCTIONS.0, INSTRUCTIONS.1);
        g.expect(ExitReason::Vmcall);
        assert_eq!(g.regs.gpr[8], 1, "what is before RDPMC");
        // RDPMC and two MOVs, the loop, MOV.
        assert_eq!(g.regs.gpr[gpr::RAX] - 1, 3 + 2000 + 1);
        // RDPMC and the NOPs; VMCALL has not retired.
        assert_eq!(g.regs.pmu.fixed[0], 1 + 2004 + 4);
        assert_eq!(g.regs.pmu.fixed[1..], [0, 0], "not enabled");

        // Without the control, IA32_PERF_GLOBAL_CTRL is the host's: 0.
        g.vmcs.guest.rip = CODE;
        g.vmcs.controls.entry -= EntryControls::LOAD_IA32_PERF_GLOBAL_CTRL;
        g.expect(ExitReason::Vmcall);
        assert_eq!(g.regs.pmu.fixed[0], 2009);
    }

    #[test]
    fn privilege_levels_are_told_apart() {
        // User code: 3 NOPs, INT 80H, NOP, VMCALL; handler: 2 NOPs, IRETQ.
        let user = [0x90, 0x90, 0x90, 0xcd, 0x80, 0x90, 0x0f, 0x01, 0xc1];
        let mut g = counting(Guest::user(&user), 0x7_0000_0007, 0x333);
        g.gate64(0x80, 0xee, 0);
        g.write(handler(0x80), &[0x90, 0x90, 0x48, 0xcf]);
        g.vmcs.guest.rsp = STACK;
        let any = event_select::EN | 0xc0;
        g.regs.pmu.event_select = [any | event_select::OS, any | event_select::USR, any, 0];
        g.expect(ExitReason::Vmcall);
        let pmu = &g.regs.pmu;
        // INT counts where it began, IRETQ too.
        assert_eq!(pmu.counters, [3, 5, 0, 0]);
        assert_eq!(pmu.fixed[0], 8);
        assert!(pmu.fixed[1] > 0 && pmu.fixed[1] == pmu.fixed[2], "{pmu:?}");
    }

    #[test]
    fn what_does_not_retire_is_not_counted() {
        // NOP, UD2.
        let mut g = counting(Guest::long(&[0x90, 0x0f, 0x0b]), INSTRUCTIONS.0, INSTRUCTIONS.1);
        g.expect_event(exception::UD, None);
        assert_eq!(g.regs.pmu.fixed[0], 1);
    }

    #[test]
    fn a_repeated_instruction_is_one() {
        // STD, REP MOVSB, CLD, VMCALL: backwards it goes byte by byte, with looks at events.
        let code = [0xfd, 0xf3, 0xa4, 0xfc, 0x0f, 0x01, 0xc1];
        let mut g = counting(Guest::long(&code), INSTRUCTIONS.0, INSTRUCTIONS.1)
            .with(gpr::RCX, 1000)
            .with(gpr::RSI, DATA + 0x2000)
            .with(gpr::RDI, DATA + 0x4000);
        g.expect(ExitReason::Vmcall);
        assert_eq!((g.regs.gpr[gpr::RCX], g.regs.pmu.fixed[0]), (0, 3));
    }

    #[test]
    fn overflow_exits_for_its_interrupt() {
        // jmp $
        let mut g = counting(Guest::long(&[0xeb, 0xfe]), INSTRUCTIONS.0, INSTRUCTIONS.1);
        g.regs.pmu.fixed[0] = COUNTER - 99_999;
        let exit = g.expect(ExitReason::ExternalInterrupt);
        assert_eq!(exit.interruption_info.0, 0);
        let pmu = &mut g.regs.pmu;
        assert!(pmu.interrupt);
        assert_eq!((pmu.fixed[0], pmu.global_status), (0, 1 << 32));
        // Cycles likewise: the TSC goes on.
        (pmu.interrupt, pmu.global_status, pmu.fixed[0]) = (false, 0, 0);
        pmu.fixed_control = 0xb0;
        pmu.fixed[1] = COUNTER - 100_000;
        g.vmcs.guest.perf_global_ctrl = 1 << 33;
        g.expect(ExitReason::ExternalInterrupt);
        assert!(g.regs.pmu.interrupt && g.regs.pmu.global_status == 1 << 33);
        assert_eq!(g.regs.pmu.fixed[0], 0);
    }

    #[test]
    fn cycles_are_not_those_of_others() {
        const LONG: u64 = 1 << 45;
        let mut g = Guest::long(&[]);
        let cpu = g.vcpu.cpu();
        cpu.pmu.fixed_control = 0x30;
        cpu.pmu.fixed[1] = COUNTER - LONG / 2;
        cpu.perf_global_ctrl = 1 << 33;
        cpu.start_counting();
        // The last look was hours ago.
        let c = &mut cpu.counting;
        (c.seen, c.tsc, c.deadline) = (c.seen - LONG, c.tsc - LONG, c.deadline - LONG);
        assert!(overflow(cpu).is_ok());
        cpu.stop_counting();
        assert_eq!(cpu.pmu.global_status, 0);
        assert!((COUNTER - LONG / 2..COUNTER).contains(&cpu.pmu.fixed[1]), "{:#x}", cpu.pmu.fixed[1]);
    }

    #[test]
    fn overflow_without_interrupt_is_only_noted() {
        // mov ecx, 200000; dec ecx; jnz -4; vmcall
        let code = [0xb9, 0x40, 0x0d, 0x03, 0x00, 0xff, 0xc9, 0x75, 0xfc, 0x0f, 0x01, 0xc1];
        let mut g = counting(Guest::long(&code), INSTRUCTIONS.0, 3);
        g.regs.pmu.fixed[0] = COUNTER - 9999;
        g.expect(ExitReason::Vmcall);
        assert_eq!((g.regs.pmu.fixed[0], g.regs.pmu.global_status), (400_001 - 10_000, 1 << 32));
        assert!(!g.regs.pmu.interrupt);
    }

    #[test]
    fn rdpmc_faults() {
        // SDM Vol. 2B, RDPMC.
        let rdpmc = [0x0f, 0x33, 0x0f, 0x01, 0xc1];
        let with = |g: Guest, ecx: u64| {
            let mut g = g.with(gpr::RCX, ecx).with(gpr::RAX, u64::MAX).with(gpr::RDX, u64::MAX);
            g.regs.pmu.counters[3] = 0xa987_6543_2101;
            g
        };
        let mut g = with(Guest::long(&rdpmc), 3);
        g.expect(ExitReason::Vmcall);
        assert_eq!((g.regs.gpr[gpr::RAX], g.regs.gpr[gpr::RDX]), (0x6543_2101, 0xa987));
        for ecx in [4, 0x4000_0003, 0x8000_0003] {
            with(Guest::long(&rdpmc), ecx).expect_event(exception::GP, Some(0));
        }
        with(Guest::user(&rdpmc), 3).expect_event(exception::GP, Some(0));
        let pce = |mut g: Guest| {
            g.vmcs.guest.cr4 |= cr4::PCE;
            g
        };
        with(pce(Guest::user(&rdpmc)), 3).expect(ExitReason::Vmcall);
        with(Guest::real(&rdpmc), 3).expect(ExitReason::Vmcall);
        // Privilege first, then the exit, then the index (Vol. 3C §26.1.1).
        let exiting = |g: Guest| g.primary(PrimaryControls::RDPMC_EXITING);
        with(exiting(Guest::user(&rdpmc)), 3).expect_event(exception::GP, Some(0));
        with(exiting(pce(Guest::user(&rdpmc))), 3).expect(ExitReason::Rdpmc);
        with(exiting(Guest::long(&rdpmc)), 9).expect(ExitReason::Rdpmc);
    }
}
