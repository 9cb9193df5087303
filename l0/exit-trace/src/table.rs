//! The tables that `--exit-stats` prints. Lines have at most 100 columns.

use std::fmt;

use crate::summary::{ForwardedRow, Latency, Row, VcpuSummary};

/// Columns of a line.
const WIDTH: usize = 100;

fn us(ns: u64) -> f64 {
    ns as f64 / 1000.0
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}

/// The four columns of a distribution, in µs.
struct Columns<'a>(&'a Latency);

impl fmt::Display for Columns<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let l = self.0;
        write!(
            f,
            "{:>10.2} {:>10.2} {:>10.2} {:>11.2}",
            us(l.median_ns),
            us(l.p90_ns),
            us(l.p99_ns),
            us(l.max_ns)
        )
    }
}

fn heading(f: &mut fmt::Formatter<'_>, title: &str, share: &str) -> fmt::Result {
    writeln!(
        f,
        "{title:<28} {:>12} {share:>7} {:>10} {:>10} {:>10} {:>11}",
        "count", "median µs", "p90 µs", "p99 µs", "max µs"
    )
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, count: u64, share: f64, latency: &Latency) -> fmt::Result {
    writeln!(f, "{name:<28} {count:>12} {share:>7.2} {}", Columns(latency))
}

impl VcpuSummary {
    fn rows(&self, f: &mut fmt::Formatter<'_>, title: &str, rows: &[Row]) -> fmt::Result {
        if rows.is_empty() {
            return Ok(());
        }
        let busy = self.time.busy_ns();
        heading(f, title, "time %")?;
        for r in rows {
            line(f, r.reason.name(), r.count, percent(r.l0.total_ns, busy), &r.l0)?;
        }
        writeln!(f)
    }

    fn forwarded_rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.l2_forwarded.is_empty() {
            return Ok(());
        }
        let busy = self.time.busy_ns();
        heading(f, "L2, forwarded to L1", "time %")?;
        for r in &self.l2_forwarded {
            line(f, r.reason.name(), r.count, percent(r.l0.total_ns, busy), &r.l0)?;
        }
        writeln!(f)?;
        heading(f, "L2 to L1 and back", "time %")?;
        for r in self.l2_forwarded.iter().filter(|r| r.returned > 0) {
            let share = percent(r.round_trip.total_ns, busy);
            line(f, r.reason.name(), r.returned, share, &r.round_trip)?;
        }
        writeln!(f)?;
        writeln!(f, "{:<28} {:>12} {:>8}  exits of L1 for one", "L2 causes exits of L1", "exits", "L1 %")?;
        for r in self.l2_forwarded.iter().filter(|r| r.returned > 0) {
            causes(f, r)?;
        }
        writeln!(f)
    }
}

/// What one forwarded exit causes: a line, and more if it gets too long.
fn causes(f: &mut fmt::Formatter<'_>, r: &ForwardedRow) -> fmt::Result {
    let multiplication = r.exit_multiplication().unwrap_or(1.0);
    let l1 = percent(r.l1_ns, r.round_trip.total_ns);
    let mut text = format!("{:<28} {multiplication:>12.2} {l1:>8.1} ", r.reason.name());
    let indent = text.chars().count();
    for (i, c) in r.caused.iter().enumerate() {
        let each = c.count as f64 / r.returned.max(1) as f64;
        let comma = if i + 1 < r.caused.len() { "," } else { "" };
        let word = format!(" {each:.2} {}{comma}", c.reason.name());
        if text.chars().count() + word.len() > WIDTH {
            writeln!(f, "{text}")?;
            text = " ".repeat(indent);
        }
        text.push_str(&word);
    }
    writeln!(f, "{text}")
}

impl fmt::Display for VcpuSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows(f, "VM exits of L1", &self.l1)?;
        for i in &self.failed {
            writeln!(f, "{} {} failed: {}", i.count, i.reason.name(), i.text)?;
        }
        if !self.failed.is_empty() {
            writeln!(f)?;
        }
        self.rows(f, "L2, kept by L0", &self.l2_kept)?;
        self.forwarded_rows(f)?;
        let t = &self.time;
        let busy = t.busy_ns();
        writeln!(
            f,
            "time: L0 {:.3} s ({:.1} %), L1 {:.3} s ({:.1} %), L2 {:.3} s ({:.1} %), idle {:.3} s",
            seconds(t.l0_ns),
            percent(t.l0_ns, busy),
            seconds(t.l1_ns),
            percent(t.l1_ns, busy),
            seconds(t.l2_ns),
            percent(t.l2_ns, busy),
            seconds(t.idle_ns)
        )?;
        write!(f, "{} exits: {} of L1, {} of L2", self.exits, self.l1_exits, self.l2_exits)?;
        if let Some(m) = self.exit_multiplication {
            write!(f, "; one of L2 takes {m:.2}")?;
        }
        writeln!(f)?;
        self.counters(f)
    }
}

impl VcpuSummary {
    /// What the engine counts besides exits.
    fn counters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(v) = self.vmcs_accesses.filter(|v| *v != crate::VmcsAccesses::default()) {
            writeln!(f, "without an exit: {} VMREADs, {} VMWRITEs", v.vmreads, v.vmwrites)?;
        }
        if let Some(h) = self.hand_overs {
            writeln!(
                f,
                "left by KVM to the software engine: {} single instructions, {} entries",
                h.instructions, h.entries
            )?;
        }
        let guest_ns = self.time.l1_ns.saturating_add(self.time.l2_ns);
        if let Some(i) = self.instructions
            && guest_ns > 0
        {
            let all = i.l1 + i.l2;
            let speed = |n: u64, ns: u64| n as f64 * 1000.0 / ns.max(1) as f64;
            write!(
                f,
                "{all} guest instructions, {:.1} million a second of guest time",
                speed(all, guest_ns)
            )?;
            if i.l2 > 0 {
                write!(
                    f,
                    " (L1 {:.1}, L2 {:.1})",
                    speed(i.l1, self.time.l1_ns),
                    speed(i.l2, self.time.l2_ns)
                )?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::{Exit, Level, Recorder};
    use x86_spec::exit::ExitReason;

    #[test]
    fn tables_fit_into_100_columns_and_name_everything() {
        let mut r = Recorder::default();
        let slow = 12_345_678_901;
        for (i, reason) in ExitReason::ALL.iter().enumerate() {
            let l2 = Exit { guest_ns: slow, l0_ns: slow, ..Exit::new(Level::L2, *reason) };
            r.exit(l2, 1);
            r.exit(Exit { forwarded: Some(ExitReason::ALL[i % 3]), ..l2 }, 2);
            r.exit(Exit { l0_ns: slow, ..Exit::new(Level::L1, *reason) }, 3);
        }
        r.exit(Exit::new(Level::L2, ExitReason::Hlt), 100);
        let text = r.summary(0).to_string();
        for line in text.lines() {
            assert!(line.chars().count() <= 100, "{line}");
        }
        for section in [
            "VM exits of L1",
            "L2, kept by L0",
            "L2, forwarded to L1",
            "L2 to L1 and back",
            "L2 causes exits of L1",
            "guest instructions",
        ] {
            assert!(text.contains(section), "{section}: {text}");
        }
    }

    #[test]
    fn what_kvm_left_to_the_software_engine_is_shown() {
        let mut r = Recorder::default();
        r.hand_overs = Some(crate::HandOvers { instructions: 12, entries: 34 });
        let text = r.summary(0).to_string();
        assert!(text.contains("software engine: 12 single instructions, 34 entries"), "{text}");
    }

    #[test]
    fn a_guest_without_guests_has_one_table() {
        let mut r = Recorder::default();
        r.exit(Exit { guest_ns: 1, l0_ns: 1, ..Exit::new(Level::L1, ExitReason::Cpuid) }, 0);
        let text = r.summary(0).to_string();
        assert!(text.starts_with("VM exits of L1") && text.contains("CPUID"), "{text}");
        assert!(!text.contains("L2,") && !text.contains("instructions"), "{text}");
    }
}
