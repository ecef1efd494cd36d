//! Which of a repository's files ella reads: configurations, tokenizers, and one set of safetensors for each network.

/// Networks and their fellows in a diffusers folder.
const PARTS: [&str; 7] = ["unet/", "vae/", "scheduler/", "text_encoder/", "text_encoder_2/", "tokenizer/", "tokenizer_2/"];

/// What is read besides weights.
const SMALL: [&str; 9] = [
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
];

/// The files to have of a repository that holds `all`.
///
/// # Errors
/// What the repository lacks, in words: it is no model, or has no safetensors.
pub(super) fn choose(all: &[String]) -> Result<Vec<String>, String> {
    let has = |name: &str| all.iter().any(|file| file == name);
    let diffusers = has("model_index.json") || has("unet/config.json");
    if !diffusers && !has("config.json") {
        return Err("expected model_index.json (diffusers) or config.json (transformers)".to_owned());
    }
    let folders: Vec<&str> = if diffusers { [&[""], &PARTS[..]].concat() } else { vec![""] };
    let mut chosen = Vec::new();
    for folder in folders {
        chosen.extend(SMALL.iter().map(|name| format!("{folder}{name}")).filter(|name| has(name)));
        // Beside a diffusers folder's parts lie single files of the same networks, in another layout.
        if !has(&format!("{folder}config.json")) || (diffusers && folder.is_empty()) {
            continue;
        }
        let weights = weights(folder, all);
        // A text encoder of the base's own is not always needed; whoever needs it will miss it.
        if weights.is_empty() && !folder.starts_with("text_encoder") {
            return Err(format!("expected {folder}*.safetensors"));
        }
        chosen.extend(weights);
    }
    Ok(chosen)
}

/// One set of safetensors: whole before half precision, a single file before shards.
fn weights(folder: &str, all: &[String]) -> Vec<String> {
    for variant in ["", ".fp16"] {
        for name in ["diffusion_pytorch_model", "model"] {
            let stem = format!("{folder}{name}{variant}");
            let single = format!("{stem}.safetensors");
            // Both spellings of a variant's index are in use; without a variant they are one.
            let indices = [format!("{folder}{name}.safetensors.index{variant}.json"), format!("{single}.index.json")];
            if all.contains(&single) {
                return vec![single];
            }
            if let Some(index) = indices.into_iter().find(|index| all.contains(index)) {
                let shard =
                    |file: &&String| file.strip_prefix(&stem).is_some_and(|rest| rest.starts_with('-') && rest.ends_with(".safetensors"));
                return all.iter().filter(shard).cloned().chain([index]).collect();
            }
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(all: &[&str]) -> Result<Vec<String>, String> {
        choose(&all.iter().map(|file| (*file).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn shards_of_a_variant_come_with_their_index_however_it_is_spelt() {
        let shards = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"];
        for index in ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"] {
            let all = ["config.json", shards[0], shards[1], index, "model.bin"];
            assert_eq!(choice(&all).unwrap(), all[..4]);
        }
    }

    #[test]
    fn of_a_diffusers_repository_one_set_of_weights_is_chosen() {
        let all = [
            "README.md",
            "model_index.json",
            "v1-5-pruned.safetensors",
            "v1-5-pruned.ckpt",
            "unet/config.json",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "safety_checker/config.json",
            "safety_checker/model.safetensors",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/pytorch_model.bin",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
        ];
        let expected = [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
        ];
        assert_eq!(choice(&all).unwrap(), expected);
    }

    #[test]
    fn of_a_transformers_repository_shards_and_tokenizer_are_chosen() {
        let all = [
            "config.json",
            "flax_model.msgpack",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "pytorch_model.bin.index.json",
            "spiece.model",
            "tokenizer.json",
        ];
        let expected = [
            "config.json",
            "tokenizer.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        assert_eq!(choice(&all).unwrap(), expected);
    }

    #[test]
    fn what_is_missing_is_said() {
        assert!(choice(&["README.md", "x.ckpt"]).unwrap_err().contains("model_index.json"));
        assert!(choice(&["config.json", "pytorch_model.bin"]).unwrap_err().contains("*.safetensors"));
        assert!(choice(&["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"]).unwrap_err().contains("unet/*"));
    }
}
