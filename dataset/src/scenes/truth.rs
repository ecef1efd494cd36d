//! What is in a scene, for whoever checks a picture or a caption against it.

use serde::Serialize;

use super::world::{Background, Object, Place, Relation, Scene};

/// A scene's truth in its JSON form; the order of its keys is the order of the fields.
#[derive(Debug, Serialize)]
pub(super) struct Truth<'a> {
    seed: u64,
    index: u64,
    background: &'a Background,
    objects: Vec<ObjectTruth>,
    relations: Vec<RelationTruth>,
}

#[derive(Debug, Serialize)]
struct ObjectTruth {
    shape: &'static str,
    color: &'static str,
    size: &'static str,
    texture: &'static str,
    place: &'static str,
    cell: Place,
    /// Left, top, right, bottom as shares of the picture.
    #[serde(rename = "box")]
    bounds: [f64; 4],
}

#[derive(Debug, Serialize)]
struct RelationTruth {
    subject: usize,
    relation: Relation,
    object: usize,
}

impl From<&Object> for ObjectTruth {
    fn from(object: &Object) -> Self {
        Self {
            shape: object.shape.name(),
            color: object.color.name(),
            size: object.size.name(),
            texture: object.texture.name(),
            place: object.place.name(),
            cell: object.place,
            bounds: object.bounds().map(|side| (f64::from(side) * 1e4).round() / 1e4),
        }
    }
}

impl<'a> Truth<'a> {
    pub(super) fn of(scene: &'a Scene) -> Self {
        let count = scene.objects.len();
        let pairs = (0..count).flat_map(|subject| (subject + 1..count).map(move |object| (subject, object)));
        let relations = pairs
            .flat_map(|(subject, object)| {
                scene.relations(subject, object).into_iter().map(move |relation| RelationTruth { subject, relation, object })
            })
            .collect();
        Self {
            seed: scene.seed,
            index: scene.index,
            background: &scene.background,
            objects: scene.objects.iter().map(ObjectTruth::from).collect(),
            relations,
        }
    }
}

impl Scene {
    /// What is in it: `seed`, `index`, `background` (`kind` and its colours), `objects` (shape, color, size, texture,
    /// place, cell, and `box`: left, top, right, bottom as shares of the picture), and `relations` between objects by
    /// their number, each pair once: “left of” from 0 to 1 implies “right of” from 1 to 0.
    pub fn truth(&self) -> serde_json::Value {
        serde_json::json!(Truth::of(self))
    }
}

#[cfg(test)]
mod tests {
    use crate::scenes::scene;

    #[test]
    fn truth_lists_objects_boxes_and_relations() {
        for index in 0..300 {
            let scene = scene(4, index);
            let truth = scene.truth();
            let objects = truth["objects"].as_array().unwrap();
            assert_eq!(objects.len(), scene.objects.len());
            for (told, object) in objects.iter().zip(&scene.objects) {
                assert_eq!(told["shape"], object.shape.name());
                assert_eq!(told["color"], object.color.name());
                assert_eq!(told["cell"]["row"], object.place.row);
                let side = |at: usize| told["box"][at].as_f64().unwrap();
                assert!(0.0 <= side(0) && side(0) < side(2) && side(2) <= 1.0);
                assert!(0.0 <= side(1) && side(1) < side(3) && side(3) <= 1.0);
            }
            let relations = truth["relations"].as_array().unwrap();
            let pairs = objects.len() * (objects.len() - 1) / 2;
            assert!((pairs..=2 * pairs).contains(&relations.len()));
            assert!(relations.iter().all(|r| r["subject"].as_u64() < r["object"].as_u64() && r["relation"].is_string()));
            assert!(truth["background"]["kind"].is_string());
        }
    }
}
