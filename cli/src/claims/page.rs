//! What was found, as one self-contained page.

use std::collections::BTreeMap;
use std::fmt::Write;

use ella_dataset::scenes::{Suite, Telling};

use super::attention::Map;
use super::lab::Lab;
use super::measure::{Compared, Spread};
use super::recipe::{Kind, base_run};
use super::{Findings, Lora, pictures};
use crate::dpg::bad;
use crate::report::{document, escape, scroll};
use crate::ui::{Fail, count, span};

const OWN: &str = "td.heat { text-align: center; color: #111; }\n.name { font-size: 13px; fill: var(--ink); }\n.pairs img { width: 128px; image-rendering: pixelated; }\n\
                   .pairs td { border: 0; max-width: 440px; font-size: 13px; }\n";

/// Prompts that are shown: the first ones with so many objects.
const SHOWN: usize = 12;
const SHOWN_OBJECTS: usize = 3;

pub(super) fn html(lab: &Lab, findings: &Findings) -> Result<String, Fail> {
    let recipe = &findings.recipe;
    let mut body = format!(
        "<h1>The paper's claims, measured in the miniature</h1>\n<p class=\"soft\">Connectors are trained for {} of {} on {} scenes; {} a connector, {} dense and as many short \
         prompts, four pictures each. {} in all. Every number is in <code>claims.json</code> and follows from the files below <code>runs/</code>, <code>drawn/</code> and \
         <code>answers/</code>.</p>\n",
        count(recipe.steps as usize, "step"),
        count(recipe.batch as usize, "sample"),
        recipe.scenes,
        count(recipe.seeds.len(), "seed"),
        recipe.prompts,
        span(findings.seconds)
    );
    body += &tiles(findings);
    body += "<h2>a. Dense prompts: the base's own encoder against the connector</h2>\n<p class=\"soft\">Per cent of the questions about a picture that are right, from the same noise. \
             The interval is of the difference: prompts and seeds drawn anew, 95 %.</p>\n";
    body += &chart(&findings.dense);
    body += &compared(&findings.dense, ["base", "connector"]);
    body += &pairs(lab)?;
    body += &kinds(findings);
    body += &heat(&findings.attention);
    body += &findings.lora.as_ref().map_or_else(String::new, lora);
    body += "<h2>e. Short prompts</h2>\n<p class=\"soft\">They name one to three things; the base was trained on such.</p>\n";
    body += &compared(&findings.short, ["base", "connector"]);
    body += &detector(&findings.detector);
    body += &runs(findings);
    Ok(document("The paper's claims in the miniature", OWN, &body))
}

fn named<'a>(all: &'a [Compared], name: &str) -> Option<&'a Compared> {
    all.iter().find(|one| one.name == name)
}

fn tiles(findings: &Findings) -> String {
    let tile = |title: &str, compared: Option<&Compared>| {
        compared.map_or_else(String::new, |Compared { before, after, difference, interval, .. }| {
            format!(
                "<div class=\"tile\"><small>{title}</small><b>{before:.1} → {after:.1}</b><small>{difference:+.1} points, 95 % within {:+.1} and {:+.1}</small></div>\n",
                interval[0], interval[1]
            )
        })
    };
    let dense = |name| named(&findings.dense, name);
    format!(
        "<div class=\"tiles\">\n{}{}{}{}</div>\n",
        tile("Dense prompts, score", dense("score")),
        tile("Attributes", dense("attribute")),
        tile("Relations", dense("relation")),
        tile("Short prompts, score", named(&findings.short, "score"))
    )
}

fn compared(all: &[Compared], names: [&str; 2]) -> String {
    let [before, after] = names;
    let mut html = format!(
        "<table><tr><th></th><th class=\"n\">{before}</th><th class=\"n\">{after}</th><th class=\"n\">difference</th><th class=\"n\">95 %</th></tr>\n"
    );
    for Compared { name, before, after, difference, interval: [low, high] } in all {
        let _ = writeln!(
            html,
            "<tr><td>{}</td><td class=\"n\">{before:.1}</td><td class=\"n\">{after:.1}</td><td class=\"n\">{difference:+.1}</td><td class=\"n\">{low:+.1} … {high:+.1}</td></tr>",
            escape(name)
        );
    }
    html + "</table>\n"
}

/// Base and connector on a scale of 0 to 100.
fn chart(all: &[Compared]) -> String {
    const LEFT: f64 = 150.0;
    const WIDTH: f64 = 730.0;
    const ROW: f64 = 26.0;
    const TOP: f64 = 10.0;
    let height = TOP + ROW * all.len() as f64;
    let x = |value: f64| LEFT + WIDTH * value.clamp(0.0, 100.0) / 100.0;
    let mut svg = format!("<svg viewBox=\"0 0 900 {}\" role=\"img\" aria-label=\"Base and connector by category\">\n", height + 24.0);
    for tick in (0..=100u8).step_by(20) {
        let at = x(f64::from(tick));
        let _ = writeln!(
            svg,
            "<path class=\"rule\" d=\"M{at:.1} {TOP}V{height}\"/><text class=\"tick\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
            height + 17.0
        );
    }
    for (row, Compared { name, before, after, .. }) in
        all.iter().enumerate().filter(|(_, one)| one.before.is_finite() && one.after.is_finite())
    {
        let y = TOP + ROW * (row as f64 + 0.5);
        let _ = writeln!(
            svg,
            "<text class=\"name\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><path d=\"M{:.1} {y:.1}H{:.1}\" style=\"stroke:var(--pale);stroke-width:3\"/>\
             <circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\" style=\"fill:var(--soft)\"/><circle cx=\"{:.1}\" cy=\"{y:.1}\" r=\"5\" style=\"fill:var(--blue)\"/>",
            LEFT - 12.0,
            y + 4.0,
            escape(name),
            x(*before),
            x(*after),
            x(*before),
            x(*after)
        );
    }
    svg + "</svg>\n<p class=\"key\"><span><i class=\"dot\" style=\"background:var(--soft)\"></i>base</span><span><i class=\"dot\" style=\"background:var(--blue)\"></i>connector</span></p>\n"
}

/// The same noise, by base and connector, beside the scene itself.
fn pairs(lab: &Lab) -> Result<String, Fail> {
    let suite = Suite::read(&lab.at("suite")).map_err(bad)?;
    let seed = lab.recipe.seeds[0];
    let (base, connector) = (base_run(seed), Kind::Tsc.run(seed));
    let mut html = format!(
        "<p class=\"soft\">The first {SHOWN} prompts with {SHOWN_OBJECTS} objects or more, the first picture of each, from the same noise.</p>\n\
         {}<table class=\"pairs\"><tr><th>prompt</th><th>the scene</th><th>base</th><th>connector</th></tr>\n",
        scroll("Pictures of prompts")
    );
    for (key, scene) in suite.scenes().filter(|(_, scene)| scene.objects.len() >= SHOWN_OBJECTS).take(SHOWN) {
        let drawn = |run: &str| pictures::first(&lab.at(&format!("drawn/{run}/dense/{key}.png")));
        let _ = write!(html, "<tr><td>{}</td>", escape(Telling::Dense.caption(&scene)));
        for (what, png) in [("scene", pictures::rendered(&scene)?), ("base", drawn(&base)?), ("connector", drawn(&connector)?)] {
            let _ = write!(html, "<td><img alt=\"{what}\" src=\"data:image/png;base64,{png}\"></td>");
        }
        html += "</tr>\n";
    }
    Ok(html + "</table></div>\n")
}

fn kinds(findings: &Findings) -> String {
    let steps = count(findings.recipe.steps as usize, "step");
    let mut html = format!(
        "<h2>b. Kinds of connectors at equal steps</h2>\n<p class=\"soft\">Dense prompts, after {steps} each: mean over seeds ± standard deviation. The paper's Table 6 has its kinds in this order, from the worst to the best. \
         All read captions at their own length but the MLP, whose states a U-Net attends to one and all: its captions are filled up to one length.</p>\n"
    );
    let columns: Vec<&String> =
        findings.kinds.first().map(|(_, spreads)| spreads.keys().filter(|name| !name.contains("object")).collect()).unwrap_or_default();
    html += &(scroll("Kinds of connectors") + "<table><tr><th></th>");
    columns.iter().for_each(|name| html += &format!("<th class=\"n\">{}</th>", escape(name)));
    html += "<th class=\"n\">held-out loss</th><th class=\"n\">the paper's DPG-Bench</th></tr>\n";
    for (kind, spreads) in &findings.kinds {
        html += &format!("<tr><td>{}</td>", kind.title());
        let cell = |name: &&String| {
            spreads.get(*name).map_or_else(String::new, |Spread { mean, deviation }| format!("{mean:.1} ± {deviation:.1}"))
        };
        columns.iter().for_each(|name| html += &format!("<td class=\"n\">{}</td>", cell(name)));
        let losses: Vec<f64> =
            findings.recipe.seeds.iter().filter_map(|seed| findings.losses.get(&kind.run(*seed)).copied().flatten()).collect();
        let loss = Spread::of(&losses).map_or_else(String::new, |Spread { mean, deviation }| format!("{mean:.3} ± {deviation:.3}"));
        html += &format!("<td class=\"n\">{loss}</td><td class=\"n\">{:.2}</td></tr>\n", kind.in_paper());
    }
    html + "</table></div>\n"
}

fn heat(map: &Map) -> String {
    let mut html = "<h2>c. What the connector looks at, from noise to picture</h2>\n<p class=\"soft\">Attention that a token gets, where the mean token of a prompt gets 1, by what its word tells; \
                    mean over prompts, queries, blocks and seeds. Colours compare a row's timesteps with each other.</p>\n"
        .to_owned()
        + &scroll("Attention by timestep")
        + "<table><tr><th>timestep</th>";
    map.timesteps.iter().for_each(|timestep| html += &format!("<th class=\"n\">{timestep}</th>"));
    html += "<th class=\"n\">tokens</th></tr>\n";
    for (name, tokens, shares) in &map.kinds {
        let mean = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
        let most = shares.iter().map(|share| (share / mean).ln().abs()).fold(0.02, f64::max);
        html += &format!("<tr><td>{name}</td>");
        for share in shares {
            let strength = (share / mean).ln() / most; // −1 to 1
            let hue = if strength > 0.0 { "196,85,14" } else { "31,95,168" };
            html += &format!(
                "<td class=\"heat\" style=\"background:rgba({hue},{:.2});color:var(--ink)\">{share:.2}</td>",
                0.65 * strength.abs()
            );
        }
        html += &format!("<td class=\"n\">{tokens}</td></tr>\n");
    }
    html + "</table></div>\n"
}

fn lora(Lora { mint, marks }: &Lora) -> String {
    let per_cent = mint.map(|share| format!("{:.1} %", 100.0 * share));
    let [base, base_with, connector, connector_with] = per_cent;
    format!(
        "<h2>d. A LoRA on the base, with the connector</h2>\n<p class=\"soft\">It was trained on the base with its own encoder, and puts every picture on a mint background, whatever the prompt says of it.</p>\n\
         <table><tr><th>pictures on mint</th><th class=\"n\">without the LoRA</th><th class=\"n\">with it</th></tr>\n\
         <tr><td>base</td><td class=\"n\">{base}</td><td class=\"n\">{base_with}</td></tr>\n<tr><td>connector</td><td class=\"n\">{connector}</td><td class=\"n\">{connector_with}</td></tr></table>\n\
         <p class=\"soft\">What the connector's pictures of dense prompts get:</p>\n{}",
        compared(marks, ["without the LoRA", "with it"])
    )
}

fn detector(accuracy: &serde_json::Value) -> String {
    let mut html = "<h2>The scorer itself</h2>\n<p class=\"soft\">A small classifier finds what is in a picture's cells. On scenes whose truth is known, which it was not trained on, it gets right:</p>\n\
                    <table><tr><th>style</th><th class=\"n\">cells</th><th class=\"n\">objects</th><th class=\"n\">questions</th></tr>\n"
        .to_owned();
    for style in accuracy.as_array().into_iter().flatten() {
        let share = |name: &str| style[name].as_f64().map_or_else(String::new, |share| format!("{:.2} %", 100.0 * share));
        let name = escape(style["style"].as_str().unwrap_or_default());
        let _ = writeln!(
            html,
            "<tr><td>{name}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            share("cells"),
            share("objects"),
            share("questions")
        );
    }
    html + "</table>\n"
}

fn runs(findings: &Findings) -> String {
    let row = |(name, loss): (&String, &Option<f64>)| {
        let loss = loss.map_or_else(|| "none".to_owned(), |loss| format!("{loss:.4}"));
        format!("<tr><td><code>runs/{}</code></td><td class=\"n\">{loss}</td></tr>\n", escape(name))
    };
    let rows: String = BTreeMap::iter(&findings.losses).map(row).collect();
    format!("<h2>Trainings</h2>\n<table><tr><th>run</th><th class=\"n\">held-out loss at its end</th></tr>\n{rows}</table>\n")
}
