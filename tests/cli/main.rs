//! The promise: the command line as DESIGN and README name it. Every test spawns the binary.

mod advice;
mod chat;
mod demo;
mod doctor;
mod generation;
#[cfg(feature = "hub")]
mod hub;
mod process;
#[path = "../common/program.rs"]
mod program;
mod readme;
mod refusals;
mod results;
mod signals;
mod stories;
mod tuning;
mod surface;
mod terminal;
