//! `nestvmm bench nested`: L2 here, under L1's KVM with VMX, and in QEMU's TCG, under L1's KVM with SVM. The VMM in
//! L1 is nestvmm in both.

use std::fmt::Write as _;

use super::median;
use super::peer::{Guest, PROMPT, Payload, READY};
use super::vmexit::{Line, parse_line};
use crate::cli::BenchNestedArgs;
use crate::interrupt;
use crate::status::Failure;

/// What L2's init prints when it is up.
const L2_READY: &str = "nestvmm: L2 ready";
/// What L2's shell prints before it reads a command.
const L2_PROMPT: &str = "l2:~#";

/// What one L1 showed.
#[derive(Debug)]
struct Measured {
    /// Milliseconds from the program's start to L1's init.
    l1_init: f64,
    /// Milliseconds from `boot-l2` to L2's init.
    l2_init: f64,
    exits: Vec<Line>,
}

/// Boots L1, measures L2's exits, boots a Linux L2, powers off.
fn measure(mut guest: Guest, rounds: u32) -> Result<Measured, Failure> {
    let l1_init = guest.wait_for(READY)?.1.as_secs_f64() * 1e3;
    guest.wait_for(PROMPT)?;
    // The mark is not in what is typed, which the terminal echoes.
    guest.type_line(&format!("nestvmm bench vmexit --engine kvm --rounds {rounds}; echo vmexit-$((1+1))"))?;
    let (output, _) = guest.wait_for("vmexit-2")?;
    let exits = output.lines().filter_map(parse_line).collect();
    let (_, typed) = guest.wait_for(PROMPT)?;
    guest.type_line("boot-l2")?;
    let l2_init = (guest.wait_for(L2_READY)?.1 - typed).as_secs_f64() * 1e3;
    guest.wait_for(L2_PROMPT)?;
    guest.type_line("poweroff -f")?;
    guest.wait_for(PROMPT)?;
    guest.power_off()?;
    Ok(Measured { l1_init, l2_init, exits })
}

/// Compares L2 here and under TCG, `args.runs` times each.
///
/// # Errors
/// [`Failure`] when the image can't be used, QEMU can't be started, or a guest does not come up.
pub fn nested(args: &BenchNestedArgs) -> Result<(), Failure> {
    interrupt::handle_signals()?;
    let payload = Payload::open(&args.image)?;
    let runs = args.runs.max(1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for n in 0..runs {
        eprintln!("run {} of {runs}: nestvmm (VMX), QEMU (TCG, SVM)", n + 1);
        ours.push(measure(Guest::spawn(&payload.own_launch()?)?, args.rounds)?);
        theirs.push(measure(Guest::spawn(&payload.qemu_launch(&args.qemu))?, args.rounds)?);
    }
    print!("{}", table(&ours, &theirs));
    Ok(())
}

/// The comparison: medians over the runs, and ratios.
fn table(ours: &[Measured], theirs: &[Measured]) -> String {
    let mut out = String::new();
    let mut row = |name: &str, unit: &str, a: f64, t: f64| {
        let _ = writeln!(out, "{name:<20}{unit:>4}{a:>12.1}{t:>12.1}{:>14.2}", a / t);
    };
    let over = |m: &[Measured], f: fn(&Measured) -> f64| median(m.iter().map(f).collect());
    row("L1 to its init", "ms", over(ours, |m| m.l1_init), over(theirs, |m| m.l1_init));
    row("L2 to its init", "ms", over(ours, |m| m.l2_init), over(theirs, |m| m.l2_init));
    let exit = |m: &[Measured], name: &str| {
        let all = m.iter().flat_map(|m| &m.exits).filter(|e| e.name == name);
        median(all.map(|e| e.median_ns as f64 / 1e3).collect())
    };
    for line in ours.first().map_or(&[][..], |m| &m.exits) {
        row(&format!("L2 {}", line.name), "µs", exit(ours, &line.name), exit(theirs, &line.name));
    }
    let head = format!("{:<20}{:>4}{:>12}{:>12}{:>14}\n", "median", "", "nestvmm", "TCG", "nestvmm/TCG");
    head + &out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians() {
        let m = |l2: f64, ns: u64| Measured {
            l1_init: 1.0,
            l2_init: l2,
            exits: vec![Line { name: "cpuid".into(), median_ns: ns }],
        };
        let t = table(&[m(300.0, 5000), m(900.0, 9000), m(100.0, 1000)], &[m(200.0, 20_000)]);
        let row = |name: &str| t.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
        assert!(row("L2 to its init").ends_with("1.50"), "{t}");
        assert!(row("L2 cpuid").contains("5.0") && row("L2 cpuid").ends_with("0.25"), "{t}");
    }
}
