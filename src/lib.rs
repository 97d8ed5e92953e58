//! tensorpager: runs transformer models larger than the memory they are given.
//!
//! The modules stand in the order of the way of a byte.

// The one error type: what, cause, fix.
pub mod error;
// Test only: bugs that the suites must catch. Nothing in a build without the feature `testing`.
pub mod planted;
// Sizes, ids, alignment.
pub mod units;
// `config.json` → geometry, units, expected tensors.
pub mod spec;
// What the source holds: safetensors, shards, accelerate folders, the hub cache.
pub mod checkpoint;
// What `offload_folder` holds: manifest, layout, pack, verify, lock.
pub mod store;
// Bytes from disk into host memory: arena, readers.
pub mod io;
// The ops of the forward pass, on a CPU (and, later, on a GPU).
pub mod device;
// Units into slots just ahead of the forward pass.
pub mod paging;
// RoPE, KV cache, the ragged pass, the forward pass.
pub mod model;
// Tokenizer, chat template, sampler.
pub mod text;
// Images and video frames → pixel values.
pub mod media;
// Sequences and sessions over a model.
pub mod engine;
// Progress and run summaries.
pub mod report;
// The command line, one file a command.
pub mod cli;
// Test only: what the fuzzers call.
pub mod fuzzing;
