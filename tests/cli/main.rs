//! The promise: the command line as DESIGN and README name it. Every test spawns the binary.

mod process;
mod refusals;
mod results;
mod signals;
mod tuning;
