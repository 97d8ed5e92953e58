#![no_main]
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    tensorpager::fuzzing::run("tokenizer_config", bytes);
});
