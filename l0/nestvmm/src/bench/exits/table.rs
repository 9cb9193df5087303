//! The tables that `bench exits` prints.

use std::fmt::Write as _;

use super::access_name;
use super::report::{Benchmark, Distribution, Kind, Measured, Mode, Report};

/// A table for each L1: a line for each kind of exit that a benchmark causes, with the modes below one another.
pub fn tables(report: &Report) -> String {
    let mut out = String::new();
    let mut l1s: Vec<_> = report.modes.iter().map(|m| m.mode.l1).collect();
    l1s.dedup();
    for l1 in l1s {
        let modes: Vec<_> = report.modes.iter().filter(|m| m.mode.l1 == l1).collect();
        let _ = writeln!(
            out,
            "Exits of L2 under {l1}, {} rounds. A line is for exits of L2 for one reason: how many there are in a round; \
             for one of them,\nmedians of entries of L0, of VMREADs and VMWRITEs of L1 (and how many of these exit); and the \
             time in L0, L1 and L2.\n",
            report.rounds
        );
        head(&mut out);
        for name in names(&modes) {
            for m in &modes {
                if let Some(b) = m.benchmarks.iter().find(|b| b.name == name) {
                    benchmark(&mut out, m.mode, b);
                }
            }
        }
        out.push('\n');
    }
    out
}

/// The benchmarks of all modes, in order.
pub fn names<'a>(modes: &[&'a Measured]) -> Vec<&'a str> {
    let mut names: Vec<&str> = Vec::new();
    for b in modes.iter().flat_map(|m| &m.benchmarks) {
        if !names.contains(&b.name.as_str()) {
            names.push(&b.name);
        }
    }
    names
}

fn head(out: &mut String) {
    let columns = |out: &mut String, [name, access, mmu, exit]: [&str; 4], counts: [&str; 4]| {
        let [each, entries, reads, writes] = counts;
        let _ = write!(out, "{name:<18}{access:<9}{mmu:<15}{exit:<20}");
        let _ = write!(out, "{each:>7}{entries:>9}{reads:>9}{writes:>10}");
    };
    columns(out, ["", "VMCS", "MMU", ""], ["exits a", "entries", "VMREADs", "VMWRITEs"]);
    for level in ["L0", "L1", "L2"] {
        let _ = write!(out, "{:>9}{:>16}", format!("{level} µs"), "");
    }
    out.push('\n');
    columns(out, ["benchmark", "access", "mode", "exit"], ["round", "of L0", "(exit)", "(exit)"]);
    for _ in 0..3 {
        let _ = write!(out, "{:>9}{:>8}{:>8}", "median", "p90", "p99");
    }
    out.push_str("  others of L1\n");
}

fn benchmark(out: &mut String, mode: Mode, b: &Benchmark) {
    let begin = format!("{:<18}{:<9}{:<15}", b.name, access_name(mode.access), mode.mmu.to_string());
    if let Some(why) = &b.skipped {
        let _ = writeln!(out, "{begin}skipped: {why}");
    } else if b.exits.is_empty() {
        let _ = writeln!(out, "{begin}no exit");
    }
    for kind in &b.exits {
        let _ = writeln!(out, "{begin}{}", line(kind, b.rounds));
    }
}

/// Exits of L1 that have columns, and the one that every exit of L2 ends with.
const EVERY: [&str; 3] = ["VMREAD", "VMWRITE", "VMRESUME"];

fn line(kind: &Kind, rounds: u64) -> String {
    let exit = format!("{}{}", kind.reason, if kind.forwarded { "" } else { " (L0)" });
    let accesses = |all: Distribution, trapped: Distribution| format!("{} ({})", all.median, trapped.median);
    let reads = accesses(kind.vmreads, kind.trapped_vmreads);
    let writes = accesses(kind.vmwrites, kind.trapped_vmwrites);
    let mut line = format!("{exit:<20}{:>7.2}", kind.per_round(rounds));
    let _ = write!(line, "{:>9}{reads:>9}{writes:>10}", kind.l0_entries.median);
    for Distribution { median, p90, p99, .. } in [kind.l0_ns, kind.l1_ns, kind.l2_ns] {
        let _ = write!(line, "{:>9}{:>8}{:>8}", micros(median), micros(p90), micros(p99));
    }
    let others = kind.caused.iter().filter(|c| !EVERY.contains(&c.reason) && c.mean >= 0.5);
    for (i, c) in others.enumerate() {
        let _ = write!(line, "{}{} {:.1}", if i == 0 { "  " } else { ", " }, c.reason, c.mean);
    }
    line
}

/// Microseconds, with as many digits as there is room for.
fn micros(ns: u64) -> String {
    let us = ns as f64 / 1e3;
    if us < 1000.0 { format!("{us:.2}") } else { format!("{us:.0}") }
}

#[cfg(test)]
mod tests {
    use super::super::console::{Outcome, Said};
    use super::super::report::tests::{chain, said};
    use super::*;
    use crate::cli::{L1Choice, MmuChoice, VmcsAccessChoice};
    use x86_spec::exit::ExitReason;

    #[test]
    fn modes_of_a_benchmark_are_below_one_another() {
        let measured = |access, forwarded| Measured {
            mode: Mode { l1: L1Choice::Microvisor, access, mmu: MmuChoice::Ept },
            benchmarks: vec![
                Benchmark::new(
                    said("cpuid", 2),
                    &[(); 2].map(|()| chain(ExitReason::Cpuid, forwarded, [1230, 45_600, 7])),
                ),
                Benchmark::new(said("invlpg", 2), &[]),
                Benchmark::new(Said { name: "mov_dr".into(), outcome: Outcome::Skipped("no".into()) }, &[]),
            ],
        };
        let modes =
            vec![measured(VmcsAccessChoice::Trapped, true), measured(VmcsAccessChoice::Shadow, false)];
        let text = tables(&Report::new(2, modes));
        let lines: Vec<Vec<&str>> = text.lines().skip(5).map(|l| l.split_whitespace().collect()).collect();
        let forwarded = "cpuid trapped ept CPUID 1.00 5 3 (1) 1 (1) 1.23 1.23 1.23 45.60 45.60 45.60 0.01 0.01 0.01 \
                         MSR_READ 1.0";
        assert_eq!(lines[0].join(" "), forwarded);
        assert_eq!(micros(12_345_678), "12346");
        assert_eq!(lines[1][..5], ["cpuid", "shadow", "ept", "CPUID", "(L0)"]);
        assert_eq!(lines[2].join(" "), "invlpg trapped ept no exit");
        assert_eq!(lines[5].join(" "), "mov_dr shadow ept skipped: no");
    }
}
