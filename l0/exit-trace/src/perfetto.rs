//! Traces in the JSON form of trace events, which Perfetto and Chrome show: for each vCPU a process with the
//! tracks L0, L1, L2 and idle, and an arrow from an exit of L2 to each exit of L1 that it caused.

use std::fmt;
use std::io::{self, Read, Seek, Write};

use crate::reader::{Trace, TraceError};
use crate::record::{Event, Exit, Level};

/// Tracks of a vCPU: their numbers as threads of its process.
#[derive(Clone, Copy)]
enum Track {
    L0 = 0,
    L1 = 1,
    L2 = 2,
    Idle = 3,
}

const TRACKS: [(Track, &str); 4] =
    [(Track::L0, "L0"), (Track::L1, "L1"), (Track::L2, "L2"), (Track::Idle, "idle")];

fn track(level: Level) -> Track {
    match level {
        Level::L1 => Track::L1,
        Level::L2 => Track::L2,
    }
}

/// Nanoseconds as the format's unit, microseconds.
struct Micros(u64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

struct Writer<W> {
    out: W,
    first: bool,
}

impl<W: Write> Writer<W> {
    /// Writes one event; `fields` are those after process and track.
    fn event(&mut self, cpu: u32, track: Track, phase: char, fields: fmt::Arguments<'_>) -> io::Result<()> {
        let comma = if std::mem::take(&mut self.first) { "" } else { ",\n" };
        let tid = track as u8;
        write!(self.out, "{comma}{{\"pid\":{cpu},\"tid\":{tid},\"ph\":\"{phase}\",{fields}}}")
    }

    fn tracks(&mut self, cpu: u32) -> io::Result<()> {
        let name = |name: fmt::Arguments<'_>, kind: &str| {
            format!("\"name\":\"{kind}\",\"args\":{{\"name\":\"{name}\"}}")
        };
        let process = name(format_args!("vCPU {cpu}"), "process_name");
        self.event(cpu, Track::L0, 'M', format_args!("{process}"))?;
        for (track, text) in TRACKS {
            let thread = name(format_args!("{text}"), "thread_name");
            self.event(cpu, track, 'M', format_args!("{thread}"))?;
            let order = track as u8;
            self.event(
                cpu,
                track,
                'M',
                format_args!("\"name\":\"thread_sort_index\",\"args\":{{\"sort_index\":{order}}}"),
            )?;
        }
        Ok(())
    }

    fn slice(
        &mut self,
        cpu: u32,
        track: Track,
        from: u64,
        ns: u64,
        rest: fmt::Arguments<'_>,
    ) -> io::Result<()> {
        let (ts, dur) = (Micros(from), Micros(ns));
        self.event(cpu, track, 'X', format_args!("\"ts\":{ts},\"dur\":{dur},{rest}"))
    }

    fn exit(&mut self, cpu: u32, e: &Exit, cause: Option<&Exit>) -> io::Result<()> {
        let reason = e.reason.name();
        if !e.synthesized {
            let start = e.time_ns.saturating_sub(e.guest_ns);
            let level = e.level;
            self.slice(cpu, track(level), start, e.time_ns - start, format_args!("\"name\":\"{level}\""))?;
        }
        let owner = match e.forwarded {
            None => "L0".to_owned(),
            Some(r) => format!("L1 as {}", r.name()),
        };
        self.slice(
            cpu,
            Track::L0,
            e.time_ns,
            e.l0_ns,
            format_args!(
                "\"name\":\"{reason}\",\"cat\":\"{}\",\"args\":{{\"number\":{},\"owner\":\"{owner}\",\
                 \"rip\":\"{:#x}\",\"qualification\":\"{:#x}\",\"guest_physical\":\"{:#x}\",\
                 \"guest_linear\":\"{:#x}\",\"instruction_length\":{},\"entry_failure\":{},\
                 \"synthesized\":{},\"failed\":\"{}\"}}",
                e.level,
                e.number,
                e.rip,
                e.qualification,
                e.guest_physical,
                e.guest_linear,
                e.instruction_length,
                e.entry_failure,
                e.synthesized,
                e.failed.map(|f| f.to_string()).unwrap_or_default()
            ),
        )?;
        if let Some(c) = cause {
            let flow = format!("\"name\":\"causes\",\"cat\":\"cause\",\"id\":\"{cpu}.{}\"", e.number);
            self.event(cpu, Track::L0, 's', format_args!("\"ts\":{},{flow}", Micros(c.time_ns)))?;
            self.event(
                cpu,
                Track::L0,
                'f',
                format_args!("\"ts\":{},\"bp\":\"e\",{flow}", Micros(e.time_ns)),
            )?;
        }
        Ok(())
    }
}

/// Writes what `wanted` takes of a trace as trace-event JSON.
///
/// # Errors
/// [`TraceError`] when reading or writing fails.
pub fn export<R: Read + Seek>(
    trace: &mut Trace<R>,
    out: impl Write,
    wanted: impl Fn(&Event) -> bool,
) -> Result<(), TraceError> {
    let mut w = Writer { out, first: true };
    writeln!(w.out, "{{\"displayTimeUnit\":\"ns\",\"traceEvents\":[")?;
    for cpu in 0..trace.header().vcpus {
        w.tracks(cpu)?;
        let mut result = Ok(());
        // The last exit of L2 that L1 got.
        let mut last: Option<Exit> = None;
        trace.for_each(cpu, |event| {
            let Some(event) = event.filter(&wanted) else { return true };
            result = match event {
                Event::Idle { time_ns, ns } => {
                    w.slice(cpu, Track::Idle, time_ns, ns, format_args!("\"name\":\"idle\""))
                }
                Event::Exit(e) => {
                    let cause = last.as_ref().filter(|l| e.cause == Some(l.number));
                    let written = w.exit(cpu, &e, cause);
                    if e.forwarded.is_some() {
                        last = Some(e);
                    }
                    written
                }
            };
            result.is_ok()
        })?;
        result?;
    }
    writeln!(w.out, "\n]}}")?;
    w.out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Cursor, Seek, SeekFrom};

    use serde_json::Value;
    use x86_spec::exit::ExitReason;
    use x86_spec::instruction_error::InstructionError;

    use super::*;
    use crate::{MIN_SIZE, Recorder, VmFail, start};

    fn exit(level: Level, reason: ExitReason, at: u64, forwarded: bool) -> Exit {
        Exit {
            time_ns: at,
            guest_ns: 60,
            l0_ns: 40,
            forwarded: forwarded.then_some(reason),
            ..Exit::new(level, reason)
        }
    }

    fn json(events: impl FnOnce(&mut Recorder)) -> Value {
        let mut file = tempfile::tempfile().unwrap();
        let writer = start(file.try_clone().unwrap(), MIN_SIZE, 1, 1, 0).unwrap().remove(0);
        let mut r = Recorder::with_trace(writer);
        events(&mut r);
        r.flush_trace();
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        let mut out = Vec::new();
        export(&mut Trace::new(Cursor::new(bytes)).unwrap(), &mut out, |_| true).unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    /// What the format demands ("Trace Event Format", its public description): each event has a phase, a
    /// process and a track; complete events have a time and a duration, and on one track they do not overlap; the
    /// two ends of a flow have the same name, category and id, and each is within a slice of its track.
    fn check(json: &Value) -> BTreeMap<String, usize> {
        let events = json["traceEvents"].as_array().expect("a list of events");
        let mut phases = BTreeMap::new();
        let mut slices: BTreeMap<(u64, u64), Vec<(f64, f64)>> = BTreeMap::new();
        let mut flows: BTreeMap<String, Vec<(&str, f64)>> = BTreeMap::new();
        for e in events {
            let phase = e["ph"].as_str().expect("a phase");
            *phases.entry(phase.to_owned()).or_insert(0) += 1;
            let track = (e["pid"].as_u64().expect("a process"), e["tid"].as_u64().expect("a track"));
            assert!(e["name"].is_string(), "{e}");
            match phase {
                "M" => assert!(e["args"].is_object(), "{e}"),
                "X" => {
                    let from = e["ts"].as_f64().expect("a time");
                    let dur = e["dur"].as_f64().expect("a duration");
                    assert!(dur >= 0.0);
                    let on_track = slices.entry(track).or_default();
                    assert!(on_track.last().is_none_or(|(_, end)| *end <= from + 1e-6), "{e}");
                    on_track.push((from, from + dur));
                }
                "s" | "f" => {
                    let at = e["ts"].as_f64().expect("a time");
                    assert!(slices[&track].iter().any(|(a, b)| (*a..=*b).contains(&at)), "{e}");
                    let id = format!("{} {} {}", e["id"], e["name"], e["cat"]);
                    flows.entry(id).or_default().push((phase, at));
                    assert_eq!(phase == "f", e["bp"] == "e");
                }
                other => panic!("phase {other}"),
            }
        }
        for ends in flows.values() {
            assert!(matches!(ends[..], [("s", a), ("f", b)] if a <= b), "{ends:?}");
        }
        phases
    }

    #[test]
    fn the_format_s_rules_hold() {
        let json = json(|r| {
            r.exit(exit(Level::L1, ExitReason::Vmlaunch, 100, false), 0);
            r.exit(exit(Level::L2, ExitReason::Cpuid, 200, true), 0);
            r.exit(exit(Level::L1, ExitReason::Vmread, 300, false), 0);
            r.exit(exit(Level::L1, ExitReason::Hlt, 400, false), 0);
            r.idle(440, 1060);
            let failed = Some(VmFail::Valid(InstructionError::VmresumeNonLaunched));
            r.exit(Exit { failed, ..exit(Level::L1, ExitReason::Vmresume, 1560, false) }, 0);
            r.exit(exit(Level::L2, ExitReason::EptViolation, 1660, false), 0);
        });
        let phases = check(&json);
        // A slice in the guest and one in L0 for each of six exits, and one for waiting; three exits are
        // caused by the CPUID.
        assert_eq!((phases["X"], phases["s"], phases["f"]), (13, 3, 3), "{phases:?}");
        let events = json["traceEvents"].as_array().unwrap();
        let names: Vec<_> = events
            .iter()
            .filter(|e| e["name"] == "thread_name")
            .map(|e| e["args"]["name"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["L0", "L1", "L2", "idle"]);
        let cpuid = events.iter().find(|e| e["name"] == "CPUID").unwrap();
        assert_eq!((&cpuid["ts"], &cpuid["dur"]), (&Value::from(0.2), &Value::from(0.04)));
        assert_eq!((&cpuid["args"]["owner"], &cpuid["args"]["failed"]), (&"L1 as CPUID".into(), &"".into()));
        let vmresume = events.iter().find(|e| e["name"] == "VMRESUME").unwrap();
        // SDM Vol. 3D table 31-1.
        assert_eq!(vmresume["args"]["failed"], "VMfailValid 5: VMRESUME with non-launched VMCS");
    }
}
