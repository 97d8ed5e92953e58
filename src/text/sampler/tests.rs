use super::*;
use proptest::prelude::*;

fn draw(seed: u64, position: u64) -> Draw {
    Draw {
        seed,
        choice: 0,
        position,
    }
}

fn warm() -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        ..SamplingParams::default()
    }
}

/// The processors as transformers writes them: full sort, masks, float64. None = removed.
fn reference(logits: &[f32], p: &SamplingParams, h: History<'_>) -> Vec<f64> {
    let mut s: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for &(id, b) in &p.logit_bias {
        s[id as usize] += f64::from(b);
    }
    for (id, x) in s.iter_mut().enumerate() {
        let n = |list: &[u32]| list.iter().filter(|&&t| t as usize == id).count();
        if n(h.prompt) + n(h.generated) > 0 {
            let r = f64::from(p.repetition_penalty);
            *x = if *x < 0.0 { *x * r } else { *x / r };
        }
        if n(h.generated) > 0 {
            *x -= n(h.generated) as f64 * f64::from(p.frequency_penalty)
                + f64::from(p.presence_penalty);
        }
    }
    s.iter_mut().for_each(|x| *x /= f64::from(p.temperature));
    let mut alive = vec![true; s.len()];
    if p.top_k > 0 && p.top_k < s.len() {
        let mut sorted = s.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let floor = sorted[p.top_k - 1];
        for (a, x) in alive.iter_mut().zip(&s) {
            *a = *x >= floor;
        }
    }
    let softmax = |s: &[f64], alive: &[bool]| {
        let best = s.iter().copied().fold(f64::MIN, f64::max);
        let e: Vec<f64> = s
            .iter()
            .zip(alive)
            .map(|(x, a)| if *a { (x - best).exp() } else { 0.0 })
            .collect();
        let z: f64 = e.iter().sum();
        e.into_iter().map(|x| x / z).collect::<Vec<_>>()
    };
    if p.top_p < 1.0 {
        let probs = softmax(&s, &alive);
        let mut ids: Vec<usize> = (0..s.len()).filter(|&i| alive[i]).collect();
        // Ascending, and among equals the highest id first, so that the lowest id is kept last.
        ids.sort_by(|&a, &b| s[a].total_cmp(&s[b]).then(b.cmp(&a)));
        let mut mass = 0.0;
        let last = ids.len() - 1;
        for (i, &id) in ids.iter().enumerate() {
            mass += probs[id];
            if mass <= 1.0 - f64::from(p.top_p) && i != last {
                alive[id] = false;
            }
        }
    }
    if p.min_p > 0.0 {
        let probs = softmax(&s, &alive);
        let best = probs.iter().copied().fold(0.0, f64::max);
        for (a, x) in alive.iter_mut().zip(&probs) {
            *a &= *x >= best * f64::from(p.min_p);
        }
    }
    softmax(&s, &alive)
}

/// Pearson's statistic of `n` draws against `probs`, and its degrees of freedom; bins below five expected hits are pooled.
fn chi_square(probs: &[f64], counts: &[u32], n: u32) -> (f64, usize) {
    let (mut stat, mut bins) = (0.0, 0);
    let (mut rest_e, mut rest_c) = (0.0, 0.0);
    for (p, &c) in probs.iter().zip(counts) {
        let e = p * f64::from(n);
        if e < 5.0 {
            rest_e += e;
            rest_c += f64::from(c);
        } else {
            stat += (f64::from(c) - e).powi(2) / e;
            bins += 1;
        }
    }
    if rest_e > 0.0 {
        stat += (rest_c - rest_e).powi(2) / rest_e.max(1.0);
        bins += 1;
    }
    (stat, bins.max(2) - 1)
}

#[test]
fn draws_follow_the_exact_distribution() {
    let logits: Vec<f32> = (0..40)
        .map(|i| ((i * 7919) % 40) as f32 * 0.11 - 1.5)
        .collect();
    let history = History {
        prompt: &[3, 4, 4, 39],
        generated: &[5, 6, 6, 6, 39],
    };
    let settings = [
        warm(),
        SamplingParams {
            temperature: 0.5,
            ..warm()
        },
        SamplingParams {
            temperature: 2.0,
            top_k: 7,
            ..warm()
        },
        SamplingParams {
            top_p: 0.7,
            ..warm()
        },
        SamplingParams {
            min_p: 0.3,
            ..warm()
        },
        SamplingParams {
            temperature: 1.3,
            top_k: 20,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.2,
            logit_bias: vec![(0, 2.0), (7, -100.0)],
            seed: 11,
        },
    ];
    let mut sampler = Sampler::new(logits.len());
    for (k, params) in settings.iter().enumerate() {
        let probs = reference(&logits, params, history);
        let mut counts = vec![0u32; logits.len()];
        let n = 20_000;
        for position in 0..u64::from(n) {
            let id = sampler
                .sample(&logits, params, history, draw(k as u64, position))
                .unwrap();
            counts[id as usize] += 1;
        }
        for (id, (&c, &p)) in counts.iter().zip(&probs).enumerate() {
            assert!(c == 0 || p > 0.0, "setting {k} drew removed token {id}");
        }
        let (stat, degrees) = chi_square(&probs, &counts, n);
        let d = degrees as f64;
        // Mean d, variance 2d: five standard deviations above would be a broken sampler, not bad luck.
        assert!(
            stat < d + 5.0 * (2.0 * d).sqrt(),
            "setting {k}: chi-square {stat} at {degrees} degrees"
        );
    }
}

#[test]
fn greedy_takes_the_lowest_id_of_equals() {
    let mut s = Sampler::new(8);
    let logits = [0.0, 2.0, -1.0, 2.0];
    let id = s.sample(
        &logits,
        &SamplingParams::greedy(),
        History::default(),
        draw(0, 0),
    );
    assert_eq!(id.unwrap(), 1);
    let id = s.sample(
        &[-0.0, 0.0],
        &SamplingParams::greedy(),
        History::default(),
        draw(0, 0),
    );
    assert_eq!(id.unwrap(), 0);
}

#[test]
fn greedy_heeds_bias_and_penalties() {
    let mut s = Sampler::new(3);
    let logits = [1.0, 2.0, 1.9];
    let h = History {
        prompt: &[1],
        generated: &[],
    };
    let p = SamplingParams {
        repetition_penalty: 1.2,
        ..SamplingParams::greedy()
    };
    assert_eq!(s.sample(&logits, &p, h, draw(0, 0)).unwrap(), 2);
    let p = SamplingParams {
        logit_bias: vec![(0, 5.0), (999, 5.0)],
        ..SamplingParams::greedy()
    };
    assert_eq!(s.sample(&logits, &p, h, draw(0, 0)).unwrap(), 0);
    let p = SamplingParams {
        presence_penalty: 0.5,
        ..SamplingParams::greedy()
    };
    // Presence looks at the answer, not at the prompt.
    assert_eq!(s.sample(&logits, &p, h, draw(0, 0)).unwrap(), 1);
}

#[test]
fn ids_beyond_the_tokenizer_are_never_chosen() {
    let mut s = Sampler::new(3);
    let logits = [0.0, 0.1, 0.2, 50.0, f32::NAN, f32::INFINITY];
    let none = History::default();
    assert_eq!(
        s.sample(&logits, &SamplingParams::greedy(), none, draw(0, 0))
            .unwrap(),
        2
    );
    for i in 0..1000 {
        assert!(s.sample(&logits, &warm(), none, draw(1, i)).unwrap() < 3);
    }
}

#[test]
fn what_is_not_finite_is_named() {
    let mut s = Sampler::new(100);
    for (bad, word) in [
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (f32::NEG_INFINITY, "-inf"),
    ] {
        let mut logits = [0.5; 50];
        logits[17] = bad;
        for params in [SamplingParams::greedy(), warm()] {
            let e = s
                .sample(&logits, &params, History::default(), draw(0, 0))
                .unwrap_err();
            assert_eq!(e.code(), Code::Checkpoint);
            assert!(
                e.what().contains("17") && e.what().contains(word),
                "{}",
                e.what()
            );
        }
    }
    assert!(
        s.sample(&[], &warm(), History::default(), draw(0, 0))
            .is_err()
    );
}

#[test]
fn extreme_values_stay_defined() {
    let mut s = Sampler::new(4);
    let logits = [f32::MAX, f32::MIN, 0.0, f32::MAX / 2.0];
    for temperature in [1e-30, 1e-3, 1.0, 1e30] {
        let p = SamplingParams {
            temperature,
            top_k: 3,
            top_p: 0.99,
            repetition_penalty: 0.5,
            ..warm()
        };
        let h = History {
            prompt: &[0, 1],
            generated: &[3],
        };
        let id = s.sample(&logits, &p, h, draw(9, 9)).unwrap();
        assert!(id < 4);
        if temperature < 1.0 {
            assert_eq!(id, 0);
        }
    }
    let tiny = SamplingParams {
        top_p: f32::MIN_POSITIVE,
        ..warm()
    };
    assert_eq!(
        s.sample(&[1.0, 3.0, 3.0, 2.0], &tiny, History::default(), draw(0, 0))
            .unwrap(),
        1
    );
}

#[test]
fn ties_with_the_kth_stay() {
    let mut s = Sampler::new(4);
    let p = SamplingParams { top_k: 2, ..warm() };
    let mut seen = [false; 4];
    for i in 0..200 {
        let id = s
            .sample(&[1.0, 2.0, 1.0, 0.0], &p, History::default(), draw(3, i))
            .unwrap();
        seen[id as usize] = true;
    }
    assert_eq!(seen, [true, true, true, false]);
}

#[test]
fn logprobs_are_a_log_softmax() {
    let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 300) as f32 / 30.0).collect();
    let z: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let mut s = Sampler::new(300);
    let mut top = Vec::new();
    let lp = s.logprobs(&logits, 5, 4, &mut top).unwrap();
    assert!((f64::from(lp) - (f64::from(logits[5]) - z.ln())).abs() < 1e-6);
    let mut ids: Vec<u32> = (0..300).collect();
    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    assert_eq!(top.iter().map(|t| t.id).collect::<Vec<_>>(), ids[..4]);
    assert!(top.windows(2).all(|w| w[0].logprob >= w[1].logprob));
    s.logprobs(&[1.0; 6], 2, 99, &mut top).unwrap();
    assert_eq!(
        top.iter().map(|t| t.id).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5]
    );
    s.logprobs(&[1.0; 6], 2, 0, &mut top).unwrap();
    assert!(top.is_empty());
    assert!(s.logprobs(&[1.0; 6], 6, 0, &mut top).is_err());
}

fn any_params() -> impl Strategy<Value = SamplingParams> {
    (
        prop_oneof![Just(0.0f32), 0.05f32..3.0],
        0usize..12,
        prop_oneof![Just(1.0f32), 0.01f32..1.0],
        prop_oneof![Just(0.0f32), 0.0f32..0.9],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        -2.0f32..2.0,
        -2.0f32..2.0,
        any::<u64>(),
    )
        .prop_map(|(t, k, p, m, r, pp, fp, seed)| SamplingParams {
            temperature: t,
            top_k: k,
            top_p: p,
            min_p: m,
            repetition_penalty: r,
            presence_penalty: pp,
            frequency_penalty: fp,
            logit_bias: vec![(1, pp)],
            seed,
        })
}

proptest! {
    /// What transformers' processors leave is what can be drawn, up to tokens within rounding of a threshold; and the
    /// result depends on the arguments only, not on what the sampler did before.
    #[test]
    fn same_arguments_same_token(
        logits in prop::collection::vec(-8.0f32..8.0, 2..400),
        params in any_params(),
        prompt in prop::collection::vec(0u32..500, 0..20),
        generated in prop::collection::vec(0u32..500, 0..20),
        position in any::<u64>(),
        noise in prop::collection::vec(-8.0f32..8.0, 1..500),
    ) {
        let h = History { prompt: &prompt, generated: &generated };
        let d = Draw { seed: params.seed, choice: 2, position };
        let fresh = Sampler::new(1000).sample(&logits, &params, h, d).unwrap();
        let mut used = Sampler::new(1000);
        for p in [&warm(), &params] {
            used.sample(&noise, p, h, d).unwrap();
        }
        prop_assert_eq!(used.sample(&logits, &params, h, d).unwrap(), fresh);
        prop_assert!(used.counts.iter().all(|&c| c == 0));
        if !params.is_greedy() {
            let known = |x: &[u32]| x.iter().copied().filter(|&t| (t as usize) < logits.len()).collect::<Vec<_>>();
            let (a, b) = (known(&prompt), known(&generated));
            let loose = SamplingParams {
                top_p: (params.top_p + 1e-4).min(1.0),
                min_p: (params.min_p - 1e-4).max(0.0),
                ..params.clone()
            };
            let probs = reference(&logits, &loose, History { prompt: &a, generated: &b });
            prop_assert!(probs[fresh as usize] > 0.0);
        }
    }

    #[test]
    fn kth_and_first_equal_a_full_sort(scores in prop::collection::vec(-40i32..40, 1..700), k in 1usize..200) {
        let scores: Vec<f32> = scores.iter().map(|s| *s as f32 * 0.5).collect();
        let mut sorted = scores.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let k = k.min(scores.len());
        prop_assert_eq!(kth_largest(&scores, k, &mut vec![1.0]), sorted[k - 1]);
        let first = scores.iter().position(|s| *s == sorted[0]);
        prop_assert_eq!(Some(argmax(&scores) as usize), first);
    }

    /// The partial selection finds the nucleus a full sort finds.
    #[test]
    fn nucleus_equals_full_sort(scores in prop::collection::vec(-6i32..6, 1..2000), p in 0.001f64..1.0) {
        let mut c: Vec<Candidate> = scores
            .iter()
            .enumerate()
            .map(|(i, &s)| Candidate { score: s as f32, id: i as u32, weight: f64::from(s).exp() })
            .collect();
        let mass = p * c.iter().map(|c| c.weight).sum::<f64>();
        let mut sorted = c.clone();
        sorted.sort_by(by_score_then_id);
        let mut before = 0.0;
        let expected: Vec<u32> = sorted
            .iter()
            .take_while(|c| { let keep = before < mass; before += c.weight; keep })
            .map(|c| c.id)
            .collect();
        let n = nucleus(&mut c, mass);
        prop_assert_eq!(c[..n].iter().map(|c| c.id).collect::<Vec<_>>(), expected);
    }
}
