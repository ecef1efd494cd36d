//! The weights in `mini/` do what their record says: the detector sees what is there, and the base draws what short captions name.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::path::{Path, PathBuf};

use ella_dataset::scenes::{Scene, Suite, World, scene_of};
use ella_model::base::Base;
use ella_model::vae::Vae;
use ella_worker::sight::{Eyes, Style, rendered};
use tch::{Device, Kind};

fn mini(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../mini").join(name)
}

fn scenes(count: u64) -> Vec<Scene> {
    (0..count).map(|index| scene_of(World::Mini, 31, index)).collect()
}

#[test]
fn the_detector_is_right_about_more_than_98_of_100_rendered_scenes_questions() {
    let eyes = Eyes::load(&mini("detector"), Device::Cpu).unwrap();
    for found in eyes.accuracy(&Suite::new(World::Mini, 31, 300, 1..=4), 64).unwrap() {
        println!("{found:?}");
        // The other styles it was not trained on.
        let least = if found.style == Style::Rendered { 0.98 } else { 0.9 };
        assert!(found.questions > least && found.cells > least, "{found:?}");
    }
}

#[test]
fn the_vae_keeps_what_the_detector_looks_for() {
    let eyes = Eyes::load(&mini("detector"), Device::Cpu).unwrap();
    let vae = Base::open(&mini("base")).unwrap().vae(Kind::Float, Device::Cpu).unwrap();
    let scenes = scenes(200);
    let through =
        |vae: &Vae| tch::no_grad(|| vae.decode(&vae.encode(&rendered(&scenes, 64).unwrap()).unwrap().0).unwrap().clamp(-1.0, 1.0));
    let sights = eyes.look(&through(&vae)).unwrap();
    let questions =
        || scenes.iter().zip(&sights).flat_map(|(scene, sight)| scene.questions().into_iter().map(move |question| question.is_so(sight)));
    let share = questions().filter(|yes| *yes).count() as f64 / questions().count() as f64;
    println!("{share:.4}");
    assert!(share > 0.95, "{share}");
}

#[test]
fn all_of_it_is_16_mb_or_less() {
    fn bytes(folder: &Path) -> u64 {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| if path.is_dir() { bytes(&path) } else { std::fs::metadata(&path).unwrap().len() }).sum()
    }
    let all = bytes(&mini(""));
    assert!(all <= 16 << 20, "{all}");
}
