//! tensorpager: runs transformer models larger than the memory they are given.
//!
//! The modules stand in the order of the way of a byte.

/// What the source holds: safetensors, shards, accelerate folders, the hub cache.
pub mod checkpoint;
/// The command line, one file a command.
pub mod cli;
/// The ops of the forward pass, on a CPU (and, later, on a GPU).
pub mod device;
/// Sequences and sessions over a model.
pub mod engine;
/// The one error type: what, cause, fix.
pub mod error;
/// Bytes from disk into host memory: arena, readers.
pub mod io;
/// Images and video frames → pixel values.
pub mod media;
/// RoPE, KV cache, the ragged pass, the forward pass.
pub mod model;
/// Units into slots just ahead of the forward pass.
pub mod paging;
/// Progress and run summaries.
pub mod report;
/// `config.json` → geometry, units, expected tensors.
pub mod spec;
/// What `offload_folder` holds: manifest, layout, pack, verify, lock.
pub mod store;
/// Tokenizer, chat template, sampler.
pub mod text;
/// Sizes, ids, alignment.
pub mod units;
