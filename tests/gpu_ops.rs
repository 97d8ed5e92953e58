//! Every op of the CUDA device against the CPU device's: on the emulated driver, or on a GPU with `TENSORPAGER_GPU=1`.

#[path = "../examples/gpu_suite/bed.rs"]
mod bed;
mod emulated;
#[path = "../examples/gpu_suite/one_pass.rs"]
mod one_pass;
#[path = "../examples/gpu_suite/ops.rs"]
mod ops;
#[path = "../examples/gpu_suite/products.rs"]
mod products;

use std::path::Path;
use std::process::Command;

use ops::Shapes;

/// In this process, on whatever driver it finds.
#[test]
#[ignore = "run by the tests below, with a driver"]
fn on_this_driver() {
    let shapes = match std::env::var("TENSORPAGER_GPU").as_deref() {
        Ok("1") => Shapes::All,
        _ => Shapes::Small,
    };
    let mut bad = 0;
    for half in ops::HALVES {
        ops::compare(half, shapes, true, &|| true, &mut |row| {
            if let Some(why) = &row.not_run {
                println!("not run: {why}");
                return;
            }
            println!(
                "{:<28} {:<4} {:9.2e} of {:7.1e}, {} shapes {}",
                row.op,
                row.half.short(),
                row.nmse,
                row.limit,
                row.shapes,
                row.differs.as_deref().unwrap_or("")
            );
            bad += usize::from(!row.ok());
        })
        .unwrap_or_else(|e| panic!("{e}"));
    }
    assert_eq!(bad, 0, "ops that differ from the CPU's");
}

/// On the emulated driver, or the GPU that is asked for.
fn run(settings: &[(&str, &str)]) -> Option<(bool, String)> {
    match std::env::var_os("TENSORPAGER_GPU") {
        None => Some(run_on(Some(emulated::driver()?), settings)),
        Some(_) => Some(run_on(None, settings)),
    }
}

fn run_on(driver: Option<&Path>, settings: &[(&str, &str)]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "on_this_driver", "--ignored", "--nocapture"]);
    if let Some(driver) = driver {
        emulated::on(&mut command, driver, settings);
    }
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn ops_agree_with_the_cpu() {
    // With cublasLt's stand-in beside the driver: bias_add is for its products.
    let library = |d: &Path| format!("{0}:{0}/cublaslt", d.display());
    let path = emulated::driver().map_or(String::new(), library);
    let Some((ok, text)) = run(&[("LD_LIBRARY_PATH", &path)]) else {
        return;
    };
    println!("{text}");
    assert!(ok, "{text}");
    if std::env::var_os("TENSORPAGER_GPU").is_none() {
        assert_eq!(text.matches("cublasLt + bias_add").count(), 2, "{text}");
        assert_eq!(text.matches("cublasLt, several").count(), 2, "{text}");
    }
    assert_eq!(text.matches("embedding rows").count(), 2, "{text}");
    assert!(text.lines().filter(|l| l.contains(" shapes")).count() >= 30);
}

/// Tensor cores cut off where the twin of `mma.sync` rounds: the limits hold for that too, and a row's bits are still its own.
#[test]
fn ops_agree_with_the_cpu_on_tensor_cores_that_truncate() {
    let Some(driver) = emulated::driver() else {
        return;
    };
    let (ok, text) = run_on(Some(driver), &[("EMUCUDA_MMA", "truncate")]);
    println!("{text}");
    assert!(ok, "{text}");
    // It did cut off: what rounds stays below a tenth of this.
    let products = text.lines().filter(|l| l.starts_with("linear + bias"));
    let nmse = products.map(|l| l.split_whitespace().nth(4).unwrap().parse::<f64>());
    assert!(nmse.clone().count() == 2 && nmse.into_iter().all(|n| n.unwrap() > 1e-11));
}

/// The same kernels on the same shapes, each access of theirs checked.
#[test]
fn ops_agree_with_the_cpu_under_address_sanitizer() {
    let Some((driver, environment)) = emulated::driver_under_asan() else {
        return;
    };
    let settings = environment
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let (ok, text) = run_on(Some(&driver), &settings);
    assert!(ok, "{text}");
    assert_eq!(text.matches("embedding rows").count(), 2, "{text}");
}

/// The comparison itself can fail: a kernel that never runs leaves its output as it was.
#[test]
fn a_missing_wait_is_noticed() {
    if std::env::var_os("TENSORPAGER_GPU").is_some() {
        return;
    }
    let ignore = [
        (
            "EMUCUDA_IGNORE",
            "cuStreamWaitEvent,cuEventSynchronize,cuStreamSynchronize",
        ),
        ("EMUCUDA_ORDER", "lazy"),
        ("EMUCUDA_RACES", "off"),
    ];
    if let Some((ok, text)) = run(&ignore) {
        assert!(!ok, "{text}");
    }
}
