//! Fused operators against libtorch's own, values and gradients: by the kernels' own text, on the processor, and on a GPU where there is one.

mod common;

use common::{devices, is_emulated, seed};
use ella_cuda::fused::{self, AdamW, Fused, Joined};
use ella_cuda::resize::{FrozenDouble, FrozenHalf};
use tch::{Device, Kind, Tensor};

/// (kind, relative tolerance): float32 differs by the order of sums, 16-bit kinds by where they are rounded.
const KINDS: [(Kind, f64); 3] = [(Kind::Float, 5e-6), (Kind::BFloat16, 1e-2), (Kind::Half, 2e-3)];

/// Normal numbers about `mean`, as a leaf that takes a gradient.
fn leaf(shape: &[i64], mean: f64, (kind, device): (Kind, Device)) -> Tensor {
    let x = (Tensor::randn(shape, (Kind::Float, Device::Cpu)) + mean).to_kind(kind).to_device(device);
    x.set_requires_grad(true)
}

/// The same numbers, channels-last if asked for.
fn laid_out(x: &Tensor, channels_last: bool) -> Tensor {
    if channels_last { x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]) } else { x.shallow_clone() }
}

/// ‖a - b‖∞ / ‖b‖∞.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let wide = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double);
    let largest = |x: Tensor| x.abs().max().double_value(&[]);
    largest(wide(a) - wide(b)) / largest(wide(b)).max(1e-30)
}

/// The gradients of one functional of `y`, the same for all of a shape, by `leaves`.
fn gradients(y: &Tensor, leaves: &[&Tensor]) -> Vec<Tensor> {
    let weights = (Tensor::arange(y.numel() as i64, (Kind::Float, y.device())) * 0.7).sin().reshape(y.size());
    let functional = (y.to_kind(Kind::Float) * weights).sum(Kind::Float);
    Tensor::run_backward(&[functional], leaves, true, false)
}

/// What goes past a norm, and the norm, as one: by both, by the one and by the other are three gradients.
fn ways(past: &Tensor, norm: &Tensor) -> [Tensor; 3] {
    [Tensor::cat(&[past.flatten(0, -1), norm.flatten(0, -1)], 0), past.shallow_clone(), norm.shallow_clone()]
}

fn agree(what: &str, tolerance: f64, found: &[Tensor], wanted: &[Tensor]) {
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let distance = distance(found, wanted);
        assert!(distance <= tolerance, "{what}, part {i}: {distance:e} > {tolerance:e}");
    }
}

/// libtorch's group norm, in float32, as the plain networks have it.
fn plain_norm(x: &Tensor, gamma: &Tensor, beta: &Tensor, add: Option<&Tensor>, groups: i64, activate: bool) -> Tensor {
    let wide = |x: &Tensor| x.to_kind(Kind::Float);
    let shifted = add.map_or_else(|| wide(x), |add| wide(x) + add.unsqueeze(-1).unsqueeze(-1));
    let y = shifted.group_norm(groups, Some(wide(gamma)), Some(wide(beta)), 1e-5, false);
    (if activate { y.silu() } else { y }).to_kind(x.kind())
}

#[test]
fn group_norms_agree_with_libtorchs() {
    let _alone = seed(1);
    // SD's own widths, groups that no vector fits, one pixel, more pixels than a block takes, and a mean far from zero.
    let shapes: [(&[i64], i64, f64); 6] = [
        (&[2, 320, 8, 8], 32, 0.0),
        (&[1, 2560, 4, 4], 32, 0.0),
        (&[3, 24, 5, 7], 3, 0.0),
        (&[2, 32, 1, 1], 8, 0.0),
        (&[1, 64, 70, 33], 32, 0.0),
        (&[2, 320, 9, 9], 32, 30.0),
    ];
    for device in devices() {
        for (kind, tolerance) in KINDS {
            for (shape, groups, mean) in shapes {
                for (activate, adds, channels_last) in [(true, true, true), (true, false, false), (false, true, true), (false, false, true)]
                {
                    let x = leaf(shape, mean, (kind, device));
                    let [gamma, beta] = [1.0, 0.0].map(|mean| leaf(&shape[1..2], mean, (kind, device)).detach());
                    let add = adds.then(|| leaf(&shape[..2], 0.0, (Kind::Float, device)));
                    let wanted = plain_norm(&x, &gamma, &beta, add.as_ref(), groups, activate);
                    let input = laid_out(&x, channels_last);
                    let (past, found) = fused::group_norm(&input.into(), (&gamma, &beta), add.as_ref(), (groups, 1e-5), activate).unwrap();
                    let past = past.one().unwrap();
                    let what = format!("{device:?} {kind:?} {shape:?} mean {mean} act {activate} add {adds}");
                    assert_eq!(found.kind(), kind);
                    // A mean of 30 leaves so many digits fewer.
                    let tolerance = tolerance * if mean > 0.0 { 20.0 } else { 1.0 };
                    agree(&what, tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                    agree(&format!("{what}, past"), 0.0, &[past.shallow_clone()], &[x.shallow_clone()]);
                    for (i, (found, wanted)) in ways(&past, &found).iter().zip(&ways(&x, &wanted)).enumerate() {
                        let leaves: Vec<&Tensor> = std::iter::once(&x).chain(add.iter().filter(|_| i != 1)).collect();
                        // What is added gets the sum over all pixels, most of which cancel.
                        let (found, wanted) = (gradients(found, &leaves), gradients(wanted, &leaves));
                        agree(&format!("{what}, gradient {i}"), 10.0 * tolerance, &found, &wanted);
                    }
                }
            }
        }
    }
}

#[test]
fn convolutions_agree_with_libtorchs_in_every_stride_and_padding() {
    let _alone = seed(2);
    for device in devices() {
        // cuDNN may take Winograd's way.
        let tolerance = if device == Device::Cpu { 1e-5 } else { 5e-5 };
        for (kernel, stride, padding, size) in
            [(3, 1, 1, (8, 8)), (3, 2, 1, (8, 8)), (3, 2, 1, (9, 7)), (1, 1, 0, (5, 6)), (3, 2, 0, (9, 8))]
        {
            let x = leaf(&[2, 16, size.0, size.1], 0.0, (Kind::Float, device));
            let weight = leaf(&[24, 16, kernel, kernel], 0.0, (Kind::Float, device)).detach();
            let wanted = x.conv2d(&weight, None::<Tensor>, [stride; 2], [padding; 2], [1, 1], 1);
            let found = fused::frozen_conv2d(&laid_out(&x, true), &weight, stride, padding).unwrap();
            let what = format!("{device:?} k {kernel} s {stride} p {padding} {size:?}");
            agree(&what, tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
            agree(&format!("{what}, gradient"), tolerance, &gradients(&found, &[&x]), &gradients(&wanted, &[&x]));
        }
    }
}

/// A norm over two maps is that over the one that they make, and each gets its own part of the gradient, and what goes past.
#[test]
fn group_norms_of_two_maps_agree_with_that_of_one() {
    let _alone = seed(8);
    for device in devices() {
        for (kind, tolerance) in KINDS {
            // The last group of the first map goes on in the second (48 channels in groups of 6, split at 32); pixels that no piece ends at.
            for (channels, groups, adds) in [([32, 16], 8, true), ([32, 16], 8, false), ([8, 24], 2, false)] {
                let [a, b] = channels.map(|channels| leaf(&[2, channels, 9, 7], 0.5, (kind, device)));
                let all = channels[0] + channels[1];
                let [gamma, beta] = [1.0, 0.0].map(|mean| leaf(&[all], mean, (kind, device)).detach());
                let add = adds.then(|| leaf(&[2, all], 0.0, (Kind::Float, device)));
                let x = Tensor::cat(&[&a, &b], 1);
                let wanted = plain_norm(&x, &gamma, &beta, add.as_ref(), groups, true);
                let joined = Joined { first: laid_out(&a, true), second: Some(b.shallow_clone()) };
                let (past, found) = fused::group_norm(&joined, (&gamma, &beta), add.as_ref(), (groups, 1e-5), true).unwrap();
                let what = format!("{device:?} {kind:?} {channels:?} add {adds}");
                agree(&what, tolerance, &[past.one().unwrap(), found.shallow_clone()], &[x.shallow_clone(), wanted.shallow_clone()]);
                let only = |past: &Tensor, norm: &Tensor| Tensor::cat(&[past.flatten(0, -1), norm.flatten(0, -1)], 0);
                let first = (only(&past.first, &found), only(&a, &wanted));
                let pairs = ways(&past.one().unwrap(), &found).into_iter().zip(ways(&x, &wanted)).chain([first]);
                for (i, (found, wanted)) in pairs.enumerate() {
                    let leaves: Vec<&Tensor> = [&a, &b].into_iter().chain(add.iter().filter(|_| i != 1)).collect();
                    agree(&format!("{what}, gradient {i}"), 10.0 * tolerance, &gradients(&found, &leaves), &gradients(&wanted, &leaves));
                }
            }
        }
    }
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let joined = Joined { first: ones(&[1, 8, 2, 2]), second: Some(ones(&[1, 8, 2, 3])) };
    let error = fused::group_norm(&joined, (&ones(&[16]), &ones(&[16])), None, (2, 1e-5), true).unwrap_err().to_string();
    assert!(error.contains("[1, 8, 2, 3]"), "{error}");
}

/// Changes of resolution by sums of weights agree with the convolutions that they stand for. Sums are rounded to 16 bits where the weights were.
#[test]
fn changes_of_resolution_agree_with_libtorchs() {
    let _alone = seed(9);
    for device in devices() {
        for (kind, tolerance) in [(Kind::Float, 5e-5), (Kind::BFloat16, 2e-2), (Kind::Half, 4e-3)] {
            for (b, d, c, (h, w)) in [(2, 16, 24, (4, 6)), (1, 8, 8, (1, 1)), (3, 40, 8, (5, 3))] {
                let what = format!("{device:?} {kind:?} {d} to {c} {h} × {w}");
                let weight = (leaf(&[c, d, 3, 3], 0.0, (Kind::Float, device)).detach() / (9.0 * d as f64).sqrt()).to_kind(kind);
                let bias = leaf(&[c], 0.0, (kind, device)).detach();
                let wide = |x: &Tensor| x.to_kind(Kind::Float);

                let x = leaf(&[b, d, h, w], 0.0, (kind, device));
                let doubled = wide(&x).upsample_nearest2d([2 * h, 2 * w], None, None);
                let wanted = doubled.conv2d(&wide(&weight), Some(wide(&bias)), [1; 2], [1; 2], [1, 1], 1).to_kind(kind);
                let found = FrozenDouble::new(&weight, &bias).unwrap().forward(&laid_out(&x, true)).unwrap();
                assert_eq!(found.kind(), kind);
                agree(&format!("{what}, doubled"), tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                agree(&format!("{what}, doubled, gradient"), tolerance, &gradients(&found, &[&x]), &gradients(&wanted, &[&x]));

                let x = leaf(&[b, d, 2 * h, 2 * w], 0.0, (kind, device));
                let wanted = wide(&x).conv2d(&wide(&weight), None::<Tensor>, [2; 2], [1; 2], [1, 1], 1).to_kind(kind);
                let found = FrozenHalf::new(&weight).unwrap().forward(&laid_out(&x, true)).unwrap();
                agree(&format!("{what}, halved"), tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                agree(&format!("{what}, halved, gradient"), tolerance, &gradients(&found, &[&x]), &gradients(&wanted, &[&x]));
            }
        }
    }
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let error = FrozenDouble::new(&ones(&[8, 8, 5, 5]), &ones(&[8])).unwrap_err().to_string();
    assert!(error.contains("[8, 8, 5, 5]"), "{error}");
    let half = FrozenHalf::new(&ones(&[8, 8, 3, 3])).unwrap();
    assert!(half.forward(&ones(&[1, 8, 3, 4])).unwrap_err().to_string().contains("even"));
    let double = FrozenDouble::new(&ones(&[8, 8, 3, 3]), &ones(&[8])).unwrap();
    assert!(double.forward(&ones(&[1, 16, 2, 2])).unwrap_err().to_string().contains("[1, 16, 2, 2]"));
}

/// Far from zero too, where almost all of a gate's slope is lost in 16 bits, and to the last digit that a kind has.
#[test]
fn gates_agree_over_their_whole_range() {
    for device in devices() {
        for (kind, epsilon) in [(Kind::Float, 2e-5), (Kind::BFloat16, 2.0f64.powi(-8)), (Kind::Half, 2.0f64.powi(-11))] {
            let gate = (Tensor::arange(8192, (Kind::Float, Device::Cpu)) / 512.0 - 8.0).to_kind(kind).to_device(device).reshape([1024, 8]);
            let both = Tensor::cat(&[&gate.ones_like(), &gate], 1).set_requires_grad(true);
            let exact = both.detach().to_kind(Kind::Double).set_requires_grad(true);
            let parts = exact.chunk(2, -1);
            let (found, wanted) = (fused::geglu(&both).unwrap(), &parts[0] * parts[1].gelu("none"));
            let slope = |y: &Tensor, of: &Tensor| Tensor::run_backward(&[y.sum(y.kind())], &[of], true, false).remove(0);
            for (what, found, wanted) in
                [("values", found.shallow_clone(), wanted.shallow_clone()), ("slopes", slope(&found, &both), slope(&wanted, &exact))]
            {
                // Of each number's own size, and of a hundredth where it is smaller: there float32 has no digits left either.
                let distance = (found.to_kind(Kind::Double) - &wanted).abs() / wanted.abs().clamp_min(1e-2);
                let distance = distance.max().double_value(&[]);
                assert!(distance <= 1.1 * epsilon, "{device:?} {kind:?} {what}: {distance:e}");
            }
        }
    }
}

#[test]
fn geglu_agrees_with_libtorchs() {
    let _alone = seed(3);
    for device in devices() {
        for (kind, tolerance) in KINDS {
            for shape in [&[2, 77, 64][..], &[1, 1, 16], &[3, 10, 2560]] {
                let both = leaf(shape, 0.0, (kind, device));
                let parts = both.to_kind(Kind::Float).chunk(2, -1);
                let wanted = (&parts[0] * parts[1].gelu("none")).to_kind(kind);
                let found = fused::geglu(&both).unwrap();
                let what = format!("{device:?} {kind:?} {shape:?}");
                agree(&what, tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                agree(&format!("{what}, gradient"), tolerance, &gradients(&found, &[&both]), &gradients(&wanted, &[&both]));
            }
        }
    }
}

#[test]
fn layer_norms_agree_with_libtorchs() {
    let _alone = seed(6);
    for device in devices() {
        for (kind, tolerance) in KINDS {
            for (shape, mean) in [(&[2, 13, 320][..], 0.0), (&[1, 1, 8], 0.0), (&[70, 16], 0.0), (&[5, 296], 0.0), (&[3, 7, 1280], 20.0)] {
                let [a, b] = [0; 2].map(|_| leaf(shape, mean, (kind, device)));
                let [gamma, beta] = [1.0, 0.0].map(|mean| leaf(&shape[shape.len() - 1..], mean, (kind, device)).detach());
                let plain = |x: &Tensor| {
                    let wide = |x: &Tensor| x.to_kind(Kind::Float);
                    wide(x).layer_norm([gamma.size()[0]], Some(wide(&gamma)), Some(wide(&beta)), 1e-5, false).to_kind(kind)
                };
                let what = format!("{device:?} {kind:?} {shape:?} mean {mean}");
                let tolerance = tolerance * if mean > 0.0 { 20.0 } else { 1.0 };
                for more in [None, Some(&b)] {
                    let (sum, found) = fused::layer_norm(&a, more, (&gamma, &beta), 1e-5).unwrap();
                    let wanted = more.map_or_else(|| a.shallow_clone(), |more| &a + more);
                    let normed = plain(&wanted);
                    let what = format!("{what}, more {}", more.is_some());
                    agree(
                        &what,
                        tolerance,
                        &[sum.shallow_clone(), found.shallow_clone()],
                        &[wanted.shallow_clone(), normed.shallow_clone()],
                    );
                    let leaves: Vec<&Tensor> = std::iter::once(&a).chain(more).collect();
                    for (i, (found, wanted)) in ways(&sum, &found).iter().zip(&ways(&wanted, &normed)).enumerate() {
                        let (found, wanted) = (gradients(found, &leaves), gradients(wanted, &leaves));
                        agree(&format!("{what}, gradient {i}"), 4.0 * tolerance, &found, &wanted);
                    }
                }
            }
        }
    }
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let error = fused::layer_norm(&ones(&[2, 12]), None, (&ones(&[12]), &ones(&[12])), 1e-5).unwrap_err().to_string();
    assert!(error.contains("not 12"), "{error}");
    assert!(fused::layer_norm(&ones(&[2, 16]), None, (&ones(&[16]), &ones(&[8])), 1e-5).unwrap_err().to_string().contains("[8]"));
    let error = fused::layer_norm(&ones(&[2, 16]), Some(&ones(&[1, 16])), (&ones(&[16]), &ones(&[16])), 1e-5).unwrap_err().to_string();
    assert!(error.contains("[1, 16]"), "{error}");
    let error = fused::layer_norm(&ones(&[2, 1288]), None, (&ones(&[1288]), &ones(&[1288])), 1e-5).unwrap_err().to_string();
    assert!(error.contains("up to 1280, not 1288"), "{error}");
}

#[test]
fn adaptive_norms_agree_with_libtorchs() {
    let _alone = seed(10);
    for device in devices() {
        for (kind, tolerance) in KINDS {
            // A connector's own sizes, fewer rows than are taken together, one, and a mean far from zero.
            for (shape, mean) in [([2, 64, 768], 0.0), ([3, 13, 320], 0.0), ([2, 1, 8], 0.0), ([1, 7, 1280], 20.0)] {
                for from in [Kind::Float, kind] {
                    let [b, _, d] = shape;
                    let x = leaf(&shape, mean, (from, device));
                    let lead = leaf(&[b, 2 * d], 0.0, (Kind::Float, device));
                    let parts = lead.unsqueeze(1).chunk(2, -1);
                    let normed = x.to_kind(Kind::Float).layer_norm([d], None::<Tensor>, None::<Tensor>, 1e-6, false);
                    let wanted = (normed * (&parts[1] + 1.0) + &parts[0]).to_kind(kind);
                    let found = fused::ada_layer_norm(&x, &lead, 1e-6, kind).unwrap();
                    assert_eq!(found.kind(), kind);
                    let what = format!("{device:?} {from:?} to {kind:?} {shape:?} mean {mean}");
                    let tolerance = tolerance * if mean > 0.0 { 20.0 } else { 1.0 };
                    agree(&what, tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                    let (found, wanted) = (gradients(&found, &[&x, &lead]), gradients(&wanted, &[&x, &lead]));
                    agree(&format!("{what}, gradients"), 4.0 * tolerance, &found, &wanted);
                }
            }
        }
    }
    let ones = |shape: &[i64], kind| Tensor::ones(shape, (kind, Device::Cpu));
    let refused = |x: Tensor, lead: &[i64], kind, word: &str| {
        let error = fused::ada_layer_norm(&x, &ones(lead, Kind::Float), 1e-6, kind).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(ones(&[2, 3, 16], Kind::Float), &[2, 16], Kind::Float, "[2, 16]");
    refused(ones(&[2, 3, 12], Kind::Float), &[2, 24], Kind::Float, "not 12");
    refused(ones(&[2, 3, 16], Kind::Half), &[2, 32], Kind::BFloat16, "BFloat16");
    refused(ones(&[2, 3, 16], Kind::Float), &[2, 32], Kind::Double, "Double");
}

#[test]
fn text_encoders_operators_agree_with_libtorchs() {
    let _alone = seed(7);
    for device in devices() {
        for (kind, tolerance) in KINDS {
            for shape in [&[2, 13, 64][..], &[5, 4096], &[1, 8], &[9, 2064]] {
                let x = leaf(shape, 0.5, (kind, device)).detach();
                let weight = leaf(&shape[shape.len() - 1..], 1.0, (kind, device)).detach();
                let wide = x.to_kind(Kind::Float);
                let scaled = &wide * (wide.square().mean_dim(-1i64, true, Kind::Float) + 1e-6).rsqrt();
                let found = fused::rms_norm(&x, &weight, 1e-6).unwrap();
                agree("rms norm", tolerance, &[found], &[scaled.to_kind(kind) * &weight]);
            }
            let both = leaf(&[3, 5, 2 * 24], 0.0, (kind, device)).detach();
            let parts = both.to_kind(Kind::Float).chunk(2, -1);
            let wanted = (parts[0].gelu("tanh") * &parts[1]).to_kind(kind);
            agree("gated GELU", tolerance, &[fused::gated_gelu(&both).unwrap()], &[wanted]);
        }
    }
    let x = leaf(&[2, 16], 0.0, (Kind::Float, Device::Cpu));
    assert!(fused::gated_gelu(&x).unwrap_err().to_string().contains("no gradient"));
    assert!(tch::no_grad(|| fused::gated_gelu(&x)).is_ok());
    let error = fused::rms_norm(&x.detach(), &Tensor::ones([8], (Kind::Float, Device::Cpu)), 1e-6).unwrap_err().to_string();
    assert!(error.contains("[8]"), "{error}");
}

/// libtorch's attention of heads, in float32.
fn plain_attention(q: &Tensor, kv: &Tensor, heads: i64) -> Tensor {
    let split = |x: &Tensor| x.to_kind(Kind::Float).unflatten(-1, [heads, -1]).transpose(1, 2);
    let (keys, values) = (kv.narrow(-1, 0, q.size()[2]), kv.narrow(-1, q.size()[2], q.size()[2]));
    let y = Tensor::scaled_dot_product_attention(&split(q), &split(&keys), &split(&values), None::<&Tensor>, 0.0, false, None, false);
    y.transpose(1, 2).flatten(2, 3).to_kind(q.kind())
}

/// How much less exact an attention of numbers so many times as large is: its scores are their products, whose exponentials have as many digits less; in 16
/// bits roundings elsewhere count for more.
fn spread(kind: Kind, size: f64) -> f64 {
    if kind == Kind::Float { size * size } else { size }
}

/// The kinds that have kernels for an attention.
fn attention_kinds(device: Device, switch: fn(Fused) -> bool) -> impl Iterator<Item = (Kind, f64)> {
    let has = move |kind| switch(Fused::ALL.on(kind, device)) && !(is_emulated() && kind == Kind::Float);
    KINDS.into_iter().filter(move |(kind, _)| has(*kind))
}

#[test]
fn attention_to_few_keys_agrees_with_libtorchs() {
    let _alone = seed(9);
    // Less than a tile of queries, whole ones, more than a block takes and more than one part; all keys, some, one; scores far from zero.
    let shapes =
        [(2, 7, 64, 2, 1.0), (1, 128, 64, 1, 1.0), (1, 300, 23, 3, 1.0), (1, 1100, 64, 1, 1.0), (2, 70, 1, 1, 1.0), (1, 64, 64, 2, 6.0)];
    for device in devices() {
        for (kind, tolerance) in attention_kinds(device, |f| f.cross) {
            for (width, (b, queries, keys, heads, size)) in
                [40, 64, 80, 160].into_iter().flat_map(|width| shapes.map(|shape| (width, shape)))
            {
                assert!(fused::fits_few_keys(keys, width));
                let q = (leaf(&[b, queries, heads * width], 0.0, (kind, device)).detach() * size).set_requires_grad(true);
                let kv = leaf(&[b, keys, 2 * heads * width], 0.0, (kind, device));
                let (found, wanted) = (fused::few_keys(&q, &kv, heads).unwrap(), plain_attention(&q, &kv, heads));
                let what = format!("{device:?} {kind:?} {b} × {queries} queries, {keys} keys, {heads} heads of {width}, size {size}");
                assert_eq!(found.kind(), kind);
                let tolerance = tolerance * spread(kind, size);
                agree(&what, tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                // Of one key, whose share is 1, the gradient by queries is none.
                let leaves: &[&Tensor] = if keys == 1 { &[&kv] } else { &[&q, &kv] };
                agree(&format!("{what}, gradient"), 4.0 * tolerance, &gradients(&found, leaves), &gradients(&wanted, leaves));
                let frozen = fused::few_keys(&q.detach(), &kv, heads).unwrap();
                agree(&format!("{what}, of keys alone"), 0.0, &gradients(&frozen, &[&kv]), &gradients(&found, &[&kv]));
            }
        }
    }
}

#[test]
fn attention_of_pixels_agrees_with_libtorchs() {
    let _alone = seed(10);
    // A tile, less and more than one, more than a block's rows; scores far from each other, of which the largest is found late; all of them so far below zero
    // that a place beyond the last pixel, whose score is zero, is infinitely above them.
    let shapes = [
        (2, 64, 1, 1.0, 0.0),
        (1, 7, 2, 1.0, 0.0),
        (1, 200, 2, 1.0, 0.0),
        (1, 330, 1, 1.0, 0.0),
        (1, 130, 1, 6.0, 0.0),
        (1, 70, 1, 1.0, 4.0),
    ];
    for device in devices() {
        for (kind, tolerance) in attention_kinds(device, |f| f.pixels) {
            for (width, (b, pixels, heads, size, apart)) in [40, 80].into_iter().flat_map(|width| shapes.map(|shape| (width, shape))) {
                assert!(fused::fits_pixels(width));
                let shift = Tensor::from_slice(&[apart as f32, -apart as f32, 0.0])
                    .repeat_interleave_self_int(heads * width, 0, None)
                    .to_device(device);
                let scale = Tensor::linspace(1.0, size, pixels, (Kind::Float, device)).reshape([1, -1, 1]);
                let numbers = leaf(&[b, pixels, 3 * heads * width], 0.0, (Kind::Float, device)).detach() * scale + shift;
                let qkv = numbers.to_kind(kind).set_requires_grad(true);
                let parts = qkv.split(heads * width, -1);
                let wanted = plain_attention(&parts[0], &Tensor::cat(&parts[1..], -1), heads);
                let found = fused::pixels(&qkv, heads).unwrap();
                let what = format!("{device:?} {kind:?} {b} × {pixels} pixels, {heads} heads of {width}, size {size}, {apart} apart");
                assert_eq!(found.kind(), kind);
                let tolerance = tolerance * spread(kind, f64::max(size, apart));
                agree(&what, tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                let [found, wanted] = [&found, &wanted].map(|y| gradients(y, &[&qkv])[0].split(heads * width, -1));
                agree(&format!("{what}, gradient"), 4.0 * tolerance, &found, &wanted);
            }
        }
    }
}

/// Numbers that went wrong before an attention come out of it as libtorch's have them: none is hidden, none is made up.
#[test]
fn what_is_no_number_goes_through_attention() {
    let _alone = seed(12);
    for device in devices() {
        for (kind, _) in KINDS.into_iter().filter(|(kind, _)| *kind != Kind::Float || device == Device::Cpu) {
            // In a query, a key and a value; an infinite value.
            for (part, bad) in [(0, f64::NAN), (1, f64::NAN), (2, f64::NAN), (2, f64::INFINITY)] {
                let qkv = leaf(&[1, 70, 3 * 40], 0.0, (kind, device)).detach();
                let _ = qkv.get(0).get(3).get(part * 40 + 5).fill_(bad);
                let [q, kv] = [qkv.narrow(-1, 0, 40).contiguous(), qkv.narrow(-1, 40, 80).contiguous()];
                // Few of the keys, or all of the pixels.
                let few = kv.narrow(1, 0, 60).contiguous();
                let all = Fused::ALL.on(kind, device);
                let found = all.cross.then(|| (fused::few_keys(&q, &few, 1).unwrap(), plain_attention(&q, &few, 1)));
                let pixels = all.pixels.then(|| (fused::pixels(&qkv, 1).unwrap(), plain_attention(&q, &kv, 1)));
                for (found, wanted) in found.into_iter().chain(pixels) {
                    assert_eq!(found.isnan(), wanted.isnan(), "{device:?} {kind:?} {bad} in part {part}");
                    assert_eq!(found.isinf(), wanted.isinf(), "{device:?} {kind:?} {bad} in part {part}");
                }
            }
        }
    }
}

#[test]
fn residuals_agree_with_libtorchs() {
    let _alone = seed(4);
    for device in devices() {
        for (kind, tolerance) in KINDS {
            let [a, b, c] = [0; 3].map(|_| leaf(&[2, 40, 5, 3], 0.0, (kind, device)));
            let bias = leaf(&[40], 0.0, (Kind::Float, device)).detach();
            for more in [None, Some(&c)] {
                let leaves: Vec<&Tensor> = [&a, &b].into_iter().chain(more).collect();
                let wide = |x: &Tensor| x.to_kind(Kind::Float);
                let wanted = leaves.iter().fold(bias.reshape([1, 40, 1, 1]), |sum, x| sum + wide(x)).to_kind(kind);
                // In two layouts: the result takes one.
                let found = fused::add_biased(&laid_out(&a, true), &b, more, &bias).unwrap();
                agree("residual", tolerance, &[found.shallow_clone()], &[wanted.shallow_clone()]);
                agree("residual, gradient", tolerance, &gradients(&found, &leaves), &gradients(&wanted, &leaves));
            }
        }
    }
}

#[test]
fn an_update_is_that_of_libtorchs_operators() {
    let _alone = seed(5);
    let by = AdamW {
        scale: 0.5,
        lr: 0.01,
        weight_decay: 0.1,
        betas: [0.9, 0.99],
        eps: 1e-8,
        corrections: [1.0 - 0.9f64.powi(3), 1.0 - 0.99f64.powi(3)],
        ema_decay: 0.7,
    };
    for device in devices() {
        for count in [1, 8, 1003, 50_000] {
            let random = || Tensor::randn([count], (Kind::Float, Device::Cpu)).to_device(device);
            let (mut p, mut m, mut v, mut ema, grad) = (random(), random(), random().square(), random(), random());
            let g = &grad * by.scale;
            let m1 = &m * by.betas[0] + &g * (1.0 - by.betas[0]);
            let v1 = &v * by.betas[1] + g.square() * (1.0 - by.betas[1]);
            let change = &m1 / (v1.sqrt() / by.corrections[1].sqrt() + by.eps) * (by.lr / by.corrections[0]);
            let p1 = &p * (1.0 - by.lr * by.weight_decay) - change;
            let ema1 = &ema * by.ema_decay + &p1 * (1.0 - by.ema_decay);
            fused::adamw([&mut p, &mut m, &mut v, &mut ema], &grad, &by).unwrap();
            agree(&format!("{device:?} {count}"), 1e-6, &[p, m, v, ema], &[p1, m1, v1, ema1]);
        }
    }
    let ones = |count: i64| Tensor::ones([count], (Kind::Float, Device::Cpu));
    let error = fused::adamw([&mut ones(3), &mut ones(3), &mut ones(3), &mut ones(3)], &ones(4), &by).unwrap_err().to_string();
    assert!(error.contains("not Float [4]"), "{error}");
}

#[test]
fn squares_are_summed_in_float64() {
    let _alone = seed(11);
    for device in devices() {
        // Nothing, less than a pack, a tail, more than all blocks take at once; and what float32 would lose or not hold.
        for (count, size) in [(0, 1.0), (5, 1.0), (50_003, 1e-25), (5_000_001, 1e19)] {
            let x = (Tensor::randn([count], (Kind::Float, Device::Cpu)) * size).to_device(device);
            let (found, wanted) = (fused::square_norm(&x).unwrap(), x.to_kind(Kind::Double).square().sum(Kind::Double));
            assert_eq!((found.kind(), found.dim(), found.device()), (Kind::Double, 0, device));
            let (found, wanted) = (found.double_value(&[]), wanted.double_value(&[]));
            assert!((found - wanted).abs() <= 1e-13 * wanted, "{device:?} {count}: {found:e}, not {wanted:e}");
        }
    }
    assert!(fused::square_norm(&Tensor::ones([4], (Kind::Half, Device::Cpu))).unwrap_err().to_string().contains("Half [4]"));
}

/// Half precision is converted by hand on the processor, and two numbers at once on a GPU: every bit pattern, there and back.
#[test]
fn all_halves_and_bfloats_survive() {
    for (kind, device) in devices().into_iter().flat_map(|device| [(Kind::Half, device), (Kind::BFloat16, device)]) {
        let bits: Vec<i16> = (i16::MIN..=i16::MAX).collect();
        let all = Tensor::from_slice(&bits).to_device(device).view_dtype(kind).reshape([1, 8, 64, 128]);
        let numbers = all.isfinite();
        let x = all.where_self(&numbers, &all.zeros_like());
        let zeros = x.zeros_like();
        let back = fused::add_biased(&x, &zeros, None, &Tensor::zeros([8], (Kind::Float, device))).unwrap();
        assert_eq!(back, x, "{device:?} {kind:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_shape() {
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, Device::Cpu));
    let error =
        fused::group_norm(&ones(&[1, 12, 2, 2]).into(), (&ones(&[12]), &ones(&[12])), None, (3, 1e-5), true).unwrap_err().to_string();
    assert!(error.contains("12 in 3 groups"), "{error}");
    let double = ones(&[1, 16]).to_kind(Kind::Double);
    assert!(fused::geglu(&double).unwrap_err().to_string().contains("not Double"));
    assert!(fused::geglu(&ones(&[1, 12])).unwrap_err().to_string().contains("12"));
    let error = fused::add_biased(&ones(&[1, 8, 2, 2]), &ones(&[1, 8, 2, 3]), None, &ones(&[8])).unwrap_err().to_string();
    assert!(error.contains("[1, 8, 2, 3]"), "{error}");
    for (q, kv, heads, part) in [
        (&[1, 4, 80][..], &[1, 65, 160][..], 2, "at most 64, not [1, 4, 80] and [1, 65, 160]"),
        (&[1, 4, 80], &[1, 8, 80], 2, "[1, 8, 80]"),
        (&[1, 4, 80], &[1, 8, 160], 3, "for 3 heads"),
        (&[1, 4, 96], &[1, 8, 192], 2, "not 48"),
    ] {
        let error = fused::few_keys(&ones(q), &ones(kv), heads).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    for (qkv, heads, part) in [(&[1, 4, 288][..], 2, "not 48"), (&[1, 4, 250], 2, "[1, 4, 250] for 2 heads"), (&[4, 240], 2, "[4, 240]")] {
        let error = fused::pixels(&ones(qkv), heads).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let bias = ones(&[8]).to_kind(Kind::Half);
    assert!(fused::add_biased(&ones(&[1, 8, 2, 2]), &ones(&[1, 8, 2, 2]), None, &bias).is_err());
}
