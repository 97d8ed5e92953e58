//! The promise: the command line as DESIGN and README name it. Every test spawns the binary.

mod doctor;
#[cfg(feature = "hub")]
mod hub;
mod process;
mod readme;
mod refusals;
mod results;
mod signals;
mod tuning;
mod surface;
