//! What is known of each VM exit, and what can be told from many.
//!
//! Every exit of the engine becomes an [`Exit`]: which level left the guest, who handled it, how long
//! the guest had run and how long L0 took. [`Statistics`] counts them; [`VcpuSummary`] is what it tells,
//! as a table and, through serde, as JSON.
//!
//! A trace file ([`format`](mod@format)) has a record of each exit, in a ring for each vCPU: [`TraceWriter`] writes it,
//! [`Trace`] reads it, [`export`] makes of it what Perfetto and Chrome show.
//!
//! **Causality.** L1 gets an exit of L2, works on it, perhaps exits to L0 itself while it does, and
//! enters L2 again. The exits of L1 from a forwarded exit of L2 to the next one of L2 are *caused by*
//! that exit. They are what makes nesting expensive ("exit multiplication", Ben-Yehuda et al., The Turtles
//! Project, OSDI 2010).

mod chain;
pub mod format;
mod perfetto;
mod reader;
mod record;
mod statistics;
mod summary;
mod table;
mod writer;

pub use chain::{Chain, Chains};
pub use perfetto::export;
pub use reader::{Trace, TraceError};
pub use record::{Event, Exit, Level, Recorder, VmFail};
pub use statistics::Statistics;
pub use summary::{
    Caused, FailedInstruction, ForwardedRow, HandOvers, Instructions, Latency, Row, Summary, TimeShares,
    VcpuSummary, VmcsAccesses,
};
pub use writer::{MIN_SIZE, TraceWriter, start};
