// min-of-several timings
use std::time::Instant;
use tensorpager::device::WeightView;
use tensorpager::device::cpu::*;
use tensorpager::units::Dtype;
fn cpu() -> f64 {
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t);
        t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
    }
}
fn peak() -> f64 {
    use std::arch::x86_64::*;
    #[target_feature(enable = "avx2,fma")]
    unsafe fn f(n: usize) -> f32 {
        let mut a = std::hint::black_box([_mm256_set1_ps(1.0); 12]);
        let m = _mm256_set1_ps(0.999);
        let c = _mm256_set1_ps(1e-3);
        for _ in 0..n {
            for x in a.iter_mut() {
                std::arch::asm!("vfmadd213ps {0},{1},{2}", inout(ymm_reg) *x, in(ymm_reg) m, in(ymm_reg) c, options(nomem,nostack));
            }
        }
        let mut s = a[0];
        for x in &a[1..] {
            s = _mm256_add_ps(s, *x);
        }
        _mm256_cvtss_f32(s)
    }
    let mut best = f64::MAX;
    for _ in 0..20 {
        let t = cpu();
        std::hint::black_box(unsafe { f(std::hint::black_box(200000)) });
        best = best.min(cpu() - t);
    }
    200000.0 * 12.0 * 16.0 / best / 1e9
}
fn main() {
    println!("peak FMA one core: {:.1} GFLOP/s", peak());
    let threads: usize = std::env::args().nth(1).map_or(2, |s| s.parse().unwrap());
    let secs: f64 = std::env::args().nth(2).map_or(0.6, |s| s.parse().unwrap());
    let only: String = std::env::args().nth(3).unwrap_or_default();
    let dev = CpuDevice::new(threads).unwrap();
    let data: Vec<u8> = {
        let n = (128 << 20) + 1536 * 151936 * 2usize;
        let mut v = vec![0u8; n];
        let mut s = 1u32;
        for c in v.chunks_exact_mut(2) {
            s = s.wrapping_mul(1664525).wrapping_add(1013904223);
            let x = (s >> 16) as f32 / 65536.0 - 0.5;
            c.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes());
        }
        v
    };
    // peak: fma throughput measured crudely by tiny problem
    for (n, k) in [
        (8960usize, 1536usize),
        (1536, 8960),
        (151936, 1536),
        (256, 1536),(8,1024),(64,1024),(64,2048),(512,2048)] {
        if !only.is_empty() && only != format!("{n}") {
            continue;
        }
        for rows in [1usize, 2, 3, 4, 8, 16, 36, 64, 512] {
            if n > 100000 && rows > 16 {
                continue;
            }
            let x: Vec<f32> = (0..rows * k)
                .map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0)
                .collect();
            let mut a = ActBuf::new(Dtype::BF16, rows, k);
            dev.round(&x, rows, k, &mut a);
            let mut out = vec![0f32; rows * n];
            let bytes = n * k * 2;
            let copies = if n < 1000 {
                1
            } else {
                ((128usize << 20) / bytes).max(1)
            };
            let mut best = f64::MAX;
            let t0 = Instant::now();
            let mut i = 0;
            let mut all = vec![];
            while i < 5 || (t0.elapsed().as_secs_f64() < secs && i < 3000) {
                let c = i % copies;
                i += 1;
                let w = WeightView::packed(Dtype::BF16, n, k, &data[c * bytes..]);
                let t = cpu();
                dev.linear(&a, rows, &w, None, &mut out, n, Mode::Store);
                let e = cpu() - t;
                all.push(e);
                if e < best {
                    best = e
                }
            }
            all.sort_by(f64::total_cmp);
            println!(
                "{n}x{k} rows {rows}: best {:.3} ms p20 {:.3} {:.2} GB/s {:.1} GFLOP/s  (p20 {:.2} GB/s {:.1})",
                best * 1e3,
                all[all.len() / 5] * 1e3,
                bytes as f64 / best / 1e9,
                2.0 * (rows * n * k) as f64 / best / 1e9,
                bytes as f64 / all[all.len() / 5] / 1e9,
                2.0 * (rows * n * k) as f64 / all[all.len() / 5] / 1e9
            );
        }
    }
}
