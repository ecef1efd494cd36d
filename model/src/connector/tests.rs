//! Every kind's layout, initial values and files.

use super::*;
use ella_cuda::fused::Fused;

const KINDS: [ConnectorKind; 4] = [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler, ConnectorKind::Mlp];

fn small(kind: ConnectorKind) -> ConnectorConfig {
    ConnectorConfig { layers: 2, heads: 2, latents: 3, time_channel: 6, time_embed_dim: 5, ..ConnectorConfig::new(kind, 8, 4) }
}

fn made(kind: ConnectorKind) -> Connector {
    Connector::init(&small(kind), 3, Device::Cpu).unwrap()
}

/// The same without what is zero at first.
fn stirred(config: &ConnectorConfig) -> Connector {
    stirred_by(config, Compute::PLAIN)
}

fn stirred_by(config: &ConnectorConfig, compute: Compute) -> Connector {
    let values = |shape: &[i64]| Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).sin().reshape(shape) * 0.3;
    let layout = Connector::layout(config).unwrap();
    let tensors = layout.into_iter().map(|(name, shape)| (name, values(&shape)));
    Connector::from_tensors(config, tensors, compute).unwrap()
}

/// Every kind, without a pooled head and with one.
fn all() -> impl Iterator<Item = ConnectorConfig> {
    KINDS.into_iter().flat_map(|kind| [None, Some(5)].map(|pooled| ConnectorConfig { pooled, ..small(kind) }))
}

fn features(b: i64, s: i64) -> Tensor {
    Tensor::arange(b * s * 4, (Kind::Float, Device::Cpu)).sin().reshape([b, s, 4])
}

/// The released shape.
fn released(kind: ConnectorKind) -> ConnectorConfig {
    ConnectorConfig::new(kind, 768, 2048)
}

fn parameters(config: &ConnectorConfig) -> i64 {
    Connector::layout(config).unwrap().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
}

#[test]
fn the_paper_s_parameter_counts_come_out() {
    // Paper §1.2, Table 6.
    assert_eq!(parameters(&released(ConnectorKind::Mlp)), 2_164_224);
    assert_eq!(parameters(&ConnectorConfig { layers: 1, ..released(ConnectorKind::Resampler) }), 8_712_192);
    assert_eq!(parameters(&released(ConnectorKind::Resampler)), 44_159_232);
    assert_eq!(parameters(&released(ConnectorKind::Tsc)), 66_820_608);
    assert_eq!(parameters(&released(ConnectorKind::TscZero)), 73_907_712);
    // Paper §1.3: SDXL's, and its head's four projections and positions.
    let sdxl = ConnectorConfig::new(ConnectorKind::Tsc, 2048, 2048);
    assert_eq!(parameters(&sdxl), 466_546_688);
    let head = 65 * 2048 + 3 * (2048 * 2048 + 2048) + 1280 * 2048 + 1280;
    assert_eq!(parameters(&ConnectorConfig { pooled: Some(1280), ..sdxl }), 466_546_688 + head);
}

/// The keys of the official code, in the order of flat buffers, at the released sizes.
fn official(kind: ConnectorKind) -> Vec<(String, Vec<i64>)> {
    let timed = kind.is_timed();
    let mut keys: Vec<(String, Vec<i64>)> = Vec::new();
    let mut key = |there: bool, name: &str, shape: &[i64]| {
        if there {
            keys.push((name.to_owned(), shape.to_vec()));
        }
    };
    key(timed, "time_embedding.linear_1.weight", &[768, 320]);
    key(timed, "time_embedding.linear_1.bias", &[768]);
    key(timed, "time_embedding.linear_2.weight", &[768, 768]);
    key(timed, "time_embedding.linear_2.bias", &[768]);
    key(true, "connector.latents", &[64, 768]);
    key(timed, "connector.time_aware_linear.weight", &[768, 768]);
    key(timed, "connector.time_aware_linear.bias", &[768]);
    key(true, "connector.proj_in.weight", &[768, 2048]);
    key(true, "connector.proj_in.bias", &[768]);
    for n in 0..6 {
        let mut block = |there, name: &str, shape: &[i64]| key(there, &format!("connector.perceiver_blocks.{n}.{name}"), shape);
        block(true, "attn.in_proj_weight", &[2304, 768]);
        block(true, "attn.in_proj_bias", &[2304]);
        block(true, "attn.out_proj.weight", &[768, 768]);
        block(true, "attn.out_proj.bias", &[768]);
        block(true, "mlp.c_fc.weight", &[3072, 768]);
        block(true, "mlp.c_fc.bias", &[3072]);
        block(true, "mlp.c_proj.weight", &[768, 3072]);
        block(true, "mlp.c_proj.bias", &[768]);
        for norm in ["ln_1", "ln_2", "ln_ff"] {
            block(timed, &format!("{norm}.linear.weight"), &[1536, 768]);
            block(timed, &format!("{norm}.linear.bias"), &[1536]);
            block(!timed, &format!("{norm}.weight"), &[768]);
            block(!timed, &format!("{norm}.bias"), &[768]);
        }
        block(kind == ConnectorKind::TscZero, "gate_linear.weight", &[1536, 768]);
        block(kind == ConnectorKind::TscZero, "gate_linear.bias", &[1536]);
    }
    keys
}

#[test]
fn the_released_shape_has_the_official_keys() {
    for kind in [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler] {
        assert_eq!(Connector::layout(&released(kind)).unwrap(), official(kind), "{kind:?}");
        // A pooled head stands beside them.
        let pooled = Connector::layout(&ConnectorConfig { pooled: Some(1280), ..released(kind) }).unwrap();
        let (body, head) = pooled.split_at(official(kind).len());
        assert!(body == official(kind) && head.iter().all(|(name, _)| name.starts_with("pool.")), "{kind:?}");
        assert_eq!(head[0], ("pool.positional_embedding".to_owned(), vec![65, 768]));
    }
}

#[test]
fn a_saved_connector_loads_as_its_kind_with_the_same_sizes_and_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connector.safetensors");
    for config in all() {
        let made = stirred(&config);
        save(&path, made.tensors(), Kind::Float).unwrap();
        let loaded = Connector::load(&path, 2, Kind::Float, Device::Cpu).unwrap();
        assert_eq!((loaded.config().kind, loaded.config().pooled), (config.kind, config.pooled));
        assert_eq!(Connector::layout(loaded.config()).unwrap(), Connector::layout(&config).unwrap(), "{config:?}");
        let (x, t) = (features(2, 5), Tensor::from_slice(&[0i64, 999]));
        let (a, b) = (made.forward(&x, &t, None).unwrap(), loaded.forward(&x, &t, None).unwrap());
        let states = if config.kind == ConnectorKind::Mlp { 5 } else { 3 };
        assert!(a.states.equal(&b.states) && a.states.size() == [2, states, 8], "{config:?}");
        assert_eq!(a.pooled.as_ref().map(Tensor::size), config.pooled.map(|width| vec![2, width]), "{config:?}");
        assert_eq!(a.pooled, b.pooled, "{config:?}");
    }
}

#[test]
fn a_file_tells_its_heads_and_is_no_network_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connector.safetensors");
    let written = |heads: Option<&str>| {
        let fields = heads.map(|heads| (HEADS_FIELD.to_owned(), heads.to_owned())).into_iter().collect();
        std::fs::write(&path, weights::encode_telling(&path, made(ConnectorKind::Tsc).tensors(), &fields).unwrap()).unwrap();
    };
    let heads = |asked: Option<i64>| Connector::load(&path, asked, Kind::Float, Device::Cpu).map(|connector| connector.config().heads);
    written(None);
    assert_eq!((heads(None).unwrap(), heads(Some(4)).unwrap()), (DEFAULT_HEADS, 4));
    written(Some("2"));
    assert_eq!((heads(None).unwrap(), heads(Some(2)).unwrap()), (2, 2));
    let refused = heads(Some(4)).unwrap_err();
    let words = "connector.safetensors: connector heads must be 2, with which it was trained (found 4)";
    assert!(refused.is_usage() && refused.to_string().contains(words), "{refused}");
    for (garbled, words) in
        [("two", "`ella.heads` of its metadata must be a whole number (found two)"), ("0", "connector heads"), ("-1", "connector heads")]
    {
        written(Some(garbled));
        let error = heads(None).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_file_s_kind_is_told_even_where_a_tensor_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("connector.safetensors");
    for config in all() {
        let all = stirred(&config);
        for at in 0..all.tensors().len() {
            let mut tensors: Vec<_> = all.tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
            let (lost, _) = tensors.remove(at);
            save(&path, &tensors, Kind::Float).unwrap();
            match Connector::load(&path, 2, Kind::Float, Device::Cpu).unwrap_err() {
                ModelError::MissingTensor { key, .. } => assert_eq!(key, lost, "{config:?}"),
                // Blocks are counted by this one.
                ModelError::SurplusTensors { .. } | ModelError::Input { .. } if lost.ends_with("in_proj_weight") => {}
                other => panic!("{config:?} without {lost}: {other}"),
            }
        }
    }
}

#[test]
fn a_file_of_another_network_is_no_connector() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.safetensors");
    let load = |tensors: &[(String, Tensor)]| {
        weights::save(&path, tensors).unwrap();
        Connector::load(&path, 2, Kind::Float, Device::Cpu).unwrap_err()
    };
    let one = |name: &str| (name.to_owned(), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)));
    let error = load(&[one("shared.weight"), one("mm_projector.0.weight")]);
    assert!(matches!(&error, ModelError::NotConnector { keys, .. } if keys == &["mm_projector.0.weight", "shared.weight"]));
    let text = error.to_string();
    assert!(["other.safetensors", "shared.weight", "connector.latents"].iter().all(|word| text.contains(word)), "{text}");
    assert!(load(&[]).to_string().contains("found no tensor"));
    // Of two kinds at once.
    let mut both = vec![one("connector.linear_1.weight")];
    both.extend(made(ConnectorKind::Resampler).tensors().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())));
    assert!(matches!(load(&both), ModelError::MissingTensor { .. } | ModelError::SurplusTensors { .. }));
}

#[test]
fn masked_tokens_have_no_influence_and_unmasked_ones_do() {
    let t = Tensor::from_slice(&[17i64]);
    let (full, mask) = (features(1, 5), Tensor::from_slice(&[true, true, true, false, false]).reshape([1, 5]));
    for kind in [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler] {
        let connector = made(kind);
        let masked = connector.forward(&full, &t, Some(&mask)).unwrap().states;
        let short = connector.forward(&full.narrow(1, 0, 3), &t, None).unwrap().states;
        assert!(masked.allclose(&short, 1e-5, 1e-6, false), "{kind:?}");
        assert!(!masked.allclose(&connector.forward(&full, &t, None).unwrap().states, 1e-5, 1e-6, false), "{kind:?}");
    }
    let refused = made(ConnectorKind::Mlp).forward(&full, &t, Some(&mask));
    assert!(matches!(refused, Err(ModelError::Unsupported { what, .. }) if what.contains("mlp")));
}

/// Values, and each parameter's gradient, made by one graph and by segments; in the kind that features come in.
fn gradients(connector: &Connector, kind: Kind, by_segments: bool) -> (Tensor, Tensor) {
    let (x, t) = (features(2, 5).to_kind(kind), Tensor::from_slice(&[3i64, 977]));
    let mask = Tensor::from_slice(&[true, true, true, true, true, true, true, false, true, false]).reshape([2, 5]);
    let mask = (connector.config().kind != ConnectorKind::Mlp).then_some(&mask);
    let weight = |x: &Tensor| (Tensor::arange(x.numel() as i64, (Kind::Float, Device::Cpu)) * 0.7).cos().reshape(x.size());
    let flat = Tensor::zeros([parameters(connector.config())], (Kind::Float, Device::Cpu));
    for (_, tensor) in connector.tensors() {
        let _ = tensor.shallow_clone().set_requires_grad(true);
    }
    if by_segments {
        let pass = connector.forward_in_segments(&x, &t, mask).unwrap();
        let Conditions { states, pooled } = &pass.conditions;
        let (values, by_states, by_pooled) = (states.copy(), weight(states), pooled.as_ref().map(weight));
        let mut last = connector.segments().len();
        pass.backward(&by_states, by_pooled.as_ref(), |segment, gradient| {
            assert_eq!(segment + 1, last, "the last comes first, and none is left out");
            last = segment;
            let elements = connector.segments()[segment].elements.clone();
            flat.narrow(0, elements.start, elements.end - elements.start).copy_(&gradient);
            Ok::<_, ModelError>(())
        })
        .unwrap();
        assert_eq!(last, 0);
        return (values, flat);
    }
    let Conditions { states, pooled } = connector.forward(&x, &t, mask).unwrap();
    let mut roots = vec![inner_product(&states, &weight(&states)).unwrap()];
    roots.extend(pooled.map(|pooled| inner_product(&pooled, &weight(&pooled)).unwrap()));
    let tensors: Vec<&Tensor> = connector.tensors().iter().map(|(_, tensor)| tensor).collect();
    let gradients = Tensor::run_backward(&roots, &tensors, false, false);
    (states.detach(), Tensor::cat(&gradients.iter().map(|gradient| gradient.reshape([-1])).collect::<Vec<_>>(), 0))
}

/// The largest difference, by the largest value.
fn off(found: &Tensor, expected: &Tensor) -> f64 {
    ((found.to_kind(Kind::Double) - expected.to_kind(Kind::Double)).abs().max() / expected.abs().max()).double_value(&[])
}

#[test]
fn segments_cover_the_flat_buffer_in_order() {
    for config in all() {
        let connector = stirred(&config);
        let mut at = 0;
        for segment in connector.segments() {
            assert_eq!(segment.elements.start, at, "{config:?}");
            at = segment.elements.end;
        }
        assert_eq!(at, parameters(&config));
        let blocks = if config.kind == ConnectorKind::Mlp { 0 } else { 2 };
        assert_eq!(connector.segments().len(), 1 + blocks + usize::from(config.pooled.is_some()), "{config:?}");
    }
    // Twelve blocks come as they lie: the tenth after the ninth.
    let many = Connector::init(&ConnectorConfig { layers: 12, ..small(ConnectorKind::Tsc) }, 0, Device::Cpu).unwrap();
    assert_eq!(many.segments().len(), 13);
}

#[test]
fn a_gradient_made_by_segments_is_that_of_one_graph() {
    for config in all() {
        let connector = stirred(&config);
        let (whole, by_segments) = (gradients(&connector, Kind::Float, false), gradients(&connector, Kind::Float, true));
        assert!(whole.0.equal(&by_segments.0), "{config:?}");
        let found = off(&by_segments.1, &whole.1);
        assert!(found < 1e-6, "{config:?}: {found}");
        assert!(whole.1.abs().max().double_value(&[]) > 0.0);
    }
}

/// Master weights stay float32, and so do their gradients: only what is computed with is shorter.
#[test]
fn computing_in_bfloat16_gives_the_same_but_for_its_rounding() {
    for config in all() {
        let connector = stirred(&config);
        let (exact, short) = (gradients(&connector, Kind::Float, true), gradients(&connector, Kind::BFloat16, true));
        assert_eq!((short.0.kind(), short.1.kind()), (Kind::BFloat16, Kind::Float));
        let (values, by_parameters) = (off(&short.0, &exact.0), off(&short.1, &exact.1));
        println!("{:?} {:?}: values {values:.1e}, gradients {by_parameters:.1e}", config.kind, config.pooled);
        assert!(values > 0.0 && values < 2e-2 && by_parameters < 2e-2, "{config:?}: {values} {by_parameters}");
    }
}

/// Norms that the timestep leads, by one operator each: the same values and gradients, in what is computed in.
#[test]
fn fused_norms_give_the_same() {
    for config in all() {
        let plain = stirred(&config);
        let fused = stirred_by(&config, Compute { fused: Fused::ALL, ..Compute::PLAIN });
        for (kind, most) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            let (expected, found) = (gradients(&plain, kind, true), gradients(&fused, kind, true));
            assert_eq!((found.0.kind(), found.1.kind()), (kind, Kind::Float));
            // Rounded at other places, unless there is nothing to fuse.
            assert!(!config.kind.is_timed() || !found.1.equal(&expected.1), "{config:?}");
            let (values, by_parameters) = (off(&found.0, &expected.0), off(&found.1, &expected.1));
            println!("{:?} {:?} {kind:?}: values {values:.1e}, gradients {by_parameters:.1e}", config.kind, config.pooled);
            assert!(values < most && by_parameters < most, "{config:?} {kind:?}: {values} {by_parameters}");
        }
    }
    // A width that no vector fits, and one that no row does, go the plain way.
    for width in [4, 2048] {
        let config = ConnectorConfig { width, layers: 1, ..small(ConnectorKind::Tsc) };
        let (plain, fused) = (stirred(&config), stirred_by(&config, Compute { fused: Fused::ALL, ..Compute::PLAIN }));
        assert!(gradients(&plain, Kind::Float, true).1.equal(&gradients(&fused, Kind::Float, true).1), "{width}");
    }
}

#[test]
fn the_timestep_counts_for_the_timed_kinds_only() {
    let of = |connector: &Connector, t: i64| connector.forward(&features(1, 5), &Tensor::from_slice(&[t]), None).unwrap();
    for config in all() {
        let connector = stirred(&config);
        let (early, late) = (of(&connector, 10), of(&connector, 900));
        assert_eq!(early.states.equal(&late.states), !config.kind.is_timed(), "{config:?}");
        assert_eq!(early.pooled == late.pooled, !config.kind.is_timed() || config.pooled.is_none(), "{config:?}");
    }
}

#[test]
fn the_initial_values_are_the_paper_s() {
    for kind in KINDS {
        let config = ConnectorConfig { layers: 1, pooled: Some(96), ..ConnectorConfig::new(kind, 256, 64) };
        for (name, tensor) in Connector::init(&config, 1, Device::Cpu).unwrap().tensors() {
            let zeros = ["in_proj_bias", "out_proj.bias", "time_aware_linear.bias", "gate_linear.bias"];
            let affine = name.contains(".ln_") && !kind.is_timed();
            let zero = zeros.iter().any(|end| name.ends_with(end)) || name.contains(".ln_") && !(affine && name.ends_with("weight"));
            assert_eq!(tensor.abs().max().double_value(&[]) == 0.0, zero, "{kind:?} {name}");
            if affine && !zero {
                assert!(tensor.equal(&tensor.ones_like()), "{name}");
            }
            let normal = name == "connector.latents" || name.starts_with("pool.") && tensor.dim() == 2;
            if normal {
                assert!((tensor.std(true).double_value(&[]) - 256f64.powf(-0.5)).abs() < 2e-3);
            }
        }
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let refused = |config: ConnectorConfig, word: &str| {
        let error = Connector::init(&config, 0, Device::Cpu).unwrap_err();
        assert!(matches!(&error, ModelError::Input { what, .. } if what == word), "{error}");
    };
    refused(ConnectorConfig { heads: 3, ..small(ConnectorKind::Tsc) }, "connector heads");
    refused(ConnectorConfig { heads: 3, ..small(ConnectorKind::Resampler) }, "connector heads");
    refused(ConnectorConfig { layers: 0, ..small(ConnectorKind::TscZero) }, "connector layers");
    refused(ConnectorConfig { time_channel: 7, ..small(ConnectorKind::TscZero) }, "connector time channels");
    refused(ConnectorConfig { width: 0, ..small(ConnectorKind::Mlp) }, "connector width");
    refused(ConnectorConfig { pooled: Some(0), ..small(ConnectorKind::Tsc) }, "connector pooled width");
    refused(ConnectorConfig { heads: 3, pooled: Some(5), ..small(ConnectorKind::Mlp) }, "connector heads");
    // What a kind does not have cannot be wrong.
    Connector::init(&ConnectorConfig { time_channel: 7, time_embed_dim: 0, ..small(ConnectorKind::Resampler) }, 0, Device::Cpu).unwrap();
    Connector::init(&ConnectorConfig { heads: 3, layers: 0, ..small(ConnectorKind::Mlp) }, 0, Device::Cpu).unwrap();
}

#[test]
fn attention_is_shares_of_keys_that_are_seen() {
    let (x, mask) = (features(2, 5), Tensor::from_slice(&[true, true, true, true, true, true, true, false, false, false]).reshape([2, 5]));
    let t = |t: i64| Tensor::from_slice(&[t, t]);
    for kind in [ConnectorKind::Tsc, ConnectorKind::TscZero, ConnectorKind::Resampler] {
        let connector = stirred(&small(kind));
        let blocks = connector.attention(&x, &t(900), Some(&mask)).unwrap();
        assert_eq!(blocks.iter().map(Tensor::size).collect::<Vec<_>>(), [[2, 3, 8], [2, 3, 8]]);
        for block in &blocks {
            assert!(off(&block.sum_dim_intlist(-1i64, false, Kind::Float), &Tensor::ones([2, 3], (Kind::Float, Device::Cpu))) < 1e-6);
            assert_eq!(block.narrow(0, 1, 1).narrow(2, 3 + 2, 3).abs().max().double_value(&[]), 0.0);
            assert!(block.narrow(0, 0, 1).min().double_value(&[]) > 0.0);
        }
        let later = connector.attention(&x, &t(10), Some(&mask)).unwrap();
        assert_eq!(blocks.iter().zip(&later).any(|(a, b)| off(a, b) > 1e-4), kind.is_timed(), "{kind:?}");
    }
    assert!(matches!(made(ConnectorKind::Mlp).attention(&x, &t(1), None), Err(ModelError::Unsupported { .. })));
}
