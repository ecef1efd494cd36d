//! What the model is asked.

/// Asks for what the paper's prompt asked for (arXiv 2403.05135, §3.2: the main objects, their surroundings, colours, textures and spatial
/// relations); its own words were not published. Three to five sentences are about the 50 words of its Table 1.
pub const DEFAULT_PROMPT: &str = "Describe this picture in one paragraph of three to five plain sentences. Say what the main objects are and \
how many, their colours, textures and shapes, where they are in relation to one another, and what surrounds them. Say only what can be seen: \
no guesses, no mood, no lists, and no opening such as \"The image shows\".";

/// Where a template takes the sample's existing caption.
const EXISTING: &str = "{caption}";

/// A template with the sample's existing caption in it; all other braces, and the caption's own, stay as they are.
pub fn fill(template: &str, existing: &str) -> String {
    template.replace(EXISTING, existing.trim())
}

/// Whether a template takes the existing caption.
pub(super) fn takes_caption(template: &str) -> bool {
    template.contains(EXISTING)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_caption_is_filled_in() {
        assert_eq!(fill("As JSON {\"a\": 1}: {caption} {{caption}} {Caption}", " a {caption} b\n"), {
            "As JSON {\"a\": 1}: a {caption} b {a {caption} b} {Caption}"
        });
        assert_eq!(fill(DEFAULT_PROMPT, "x"), DEFAULT_PROMPT);
        assert!(takes_caption("{caption}") && !takes_caption(DEFAULT_PROMPT));
    }
}
