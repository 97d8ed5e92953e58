//! The emulated CUDA driver keeps what it promises and notices what it must: its own cases, of which half must fail.

mod emulated;

#[test]
fn self_test() {
    let Some(report) = emulated::selftest() else {
        return;
    };
    let cases = report.lines().filter(|l| l.starts_with("ok")).count();
    assert!(cases >= 25, "{report}");
}

#[test]
fn self_test_under_address_sanitizer() {
    let Some(report) = emulated::selftest_under_asan() else {
        return;
    };
    assert!(report.contains("ok   reading past the end"), "{report}");
}

#[test]
fn a_driver_without_a_function() {
    let Some(folder) = emulated::driver_without("cuMemHostRegister_v2") else {
        return;
    };
    let library = std::fs::read(folder.join("libcuda.so.1")).unwrap();
    let exported = |name: &[u8]| library.windows(name.len()).any(|w| w == name);
    assert!(exported(b"\0cuMemHostUnregister\0") && exported(b"\0cuInit\0"));
}
