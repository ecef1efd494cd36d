//! Whether what a config names can be reached from any node of a cluster.

use crate::error::{RenderError, field};
use ella_proto::config::Config;
use std::path::Path;

/// Where a path of this machine, or of one node, is of no use.
const ADVICE: &str = "pods see no files of this machine; use a URL (s3://, gs://, az://), or name a folder that all nodes share: --volume \
                      nfs:SERVER:/FOLDER, claim:NAME, or host:/FOLDER on a cluster of one node or where it is the same file system on all";

/// Refuses what pods could not reach, and gives what people should know of the rest. `egress`: ports that the overlays do not open.
pub(crate) fn check(config: &Config, mounted: Option<&str>, overlays: &[String], egress: &[u16]) -> Result<Vec<String>, RenderError> {
    let named = named(config);
    for place in &named {
        place.check(mounted)?;
    }
    let notes = named.iter().flat_map(|place| [place.credentials(overlays), place.way_out(overlays, egress)]);
    let mut notes: Vec<String> = notes.flatten().collect();
    notes.sort();
    notes.dedup();
    Ok(notes)
}

/// Something that a config names.
struct Place {
    key: &'static str,
    value: String,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Written to.
    Output,
    /// Only read.
    Source,
    /// A folder, a file, or an id on the model hub.
    Model,
}

fn named(config: &Config) -> Vec<Place> {
    let place = |key, kind| move |value: String| Place { key, value, kind };
    let output = place("run.output", Kind::Output);
    match config {
        Config::Run(run) => {
            let own = [output(run.run.output.clone()), place("data.path", Kind::Output)(run.data.path.clone())];
            let models = run.models().map(|(key, model)| place(key, Kind::Model)(model.to_owned()));
            own.into_iter().chain(models).collect()
        }
        Config::Job(job) => {
            let table: toml::Table = job.to_toml().parse().unwrap_or_default();
            let text = |kind: &str, key: &str| table.get(kind)?.get(key)?.as_str().map(str::to_owned);
            let sources = table.get("prepare").and_then(|prepare| prepare.get("sources")?.as_array()).into_iter().flatten();
            let sources = sources.filter_map(|source| Some(place("prepare.sources", Kind::Source)(source.as_str()?.to_owned())));
            let models = [
                text("prepare", "latents").map(place("prepare.latents", Kind::Model)),
                text("embed", "text").map(place("embed.text", Kind::Model)),
                text("draw", "prompts").map(place("draw.prompts", Kind::Source)),
                text("draw", "base").map(place("draw.base", Kind::Model)),
                text("draw", "connector").map(place("draw.connector", Kind::Model)),
                text("draw", "text").map(place("draw.text", Kind::Model)),
            ];
            let loras = table.get("draw").and_then(|draw| draw.get("loras")?.as_array()).into_iter().flatten();
            let loras = loras.filter_map(|lora| Some(place("draw.loras", Kind::Model)(lora.get("file")?.as_str()?.to_owned())));
            let endpoint = table.get("caption").and_then(|caption| caption.get("ask")?.get("endpoint")?.as_str().map(str::to_owned));
            let endpoint = endpoint.map(place("caption.ask.endpoint", Kind::Source));
            let data = place("job.data", Kind::Output)(job.job.data.clone());
            [data].into_iter().chain(sources).chain(models.into_iter().flatten()).chain(loras).chain(endpoint).collect()
        }
    }
}

impl Place {
    fn check(&self, mounted: Option<&str>) -> Result<(), RenderError> {
        let wrong = |rule: &str| Err(field(self.key, format_args!("{:?}", self.value), rule));
        let path = match self.value.split_once("://") {
            Some(("s3" | "gs" | "az", _)) => return Ok(()),
            Some(("http" | "https", _)) if self.kind == Kind::Source => return Ok(()),
            Some(("file", path)) => path,
            Some(_) => return wrong("pods can use no such URL; use s3://, gs:// or az://"),
            None => &self.value,
        };
        match mounted {
            Some(_) if path.split('/').any(|part| part == "..") => wrong("it must not have .. in it: that leads out of the shared folder"),
            Some(mounted) if path.starts_with('/') && !Path::new(path).starts_with(mounted) => {
                wrong(&format!("the shared folder is at {mounted} in the pods, and other paths are not there; see --volume and --mount"))
            }
            Some(_) => Ok(()),
            // An id on the hub, unless it is a folder here.
            None if self.kind == Kind::Model && !path.starts_with(['/', '.', '~']) && !Path::new(path).exists() => Ok(()),
            None => wrong(ADVICE),
        }
    }

    /// Which overlay gives the pods what a store asks for, if none was named.
    fn credentials(&self, overlays: &[String]) -> Option<String> {
        let (scheme, known): (_, &[&str]) = match self.value.split_once("://")?.0 {
            "s3" => ("s3", &["s3", "s3-secret"]),
            "gs" => ("gs", &["gcs"]),
            "az" => ("az", &["azure"]),
            _ => return None,
        };
        let named = overlays.iter().any(|overlay| known.contains(&overlay.as_str()));
        let note = || format!("{scheme}:// is used, and no overlay gives the pods credentials for it: --overlay {}", known.join(" or "));
        (!named).then(note)
    }

    /// Which port is to be opened for an address on the web, if the network policies let no pod out there. Its address may hold a secret.
    fn way_out(&self, overlays: &[String], egress: &[u16]) -> Option<String> {
        let (scheme, rest) = self.value.split_once("://")?;
        let usual = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let port: u16 = host.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(usual);
        let by_overlay = overlays.iter().any(|overlay| overlay == "s3-secret") && [80, 9000].contains(&port);
        let open = port == 443 || by_overlay || egress.contains(&port);
        (!open).then(|| format!("`{}` names an address at port {port}, and pods are not let out there: add --egress {port}", self.key))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn run(output: &str, data: &str, base: &str) -> Config {
        let text = format!("[run]\noutput = {output:?}\n[base]\nmodel = {base:?}\n[text]\nmodel = \"org/t5\"\n[data]\npath = {data:?}\n");
        Config::parse(&text, "run.toml", &[]).unwrap()
    }

    fn said(config: &Config, mounted: Option<&str>) -> String {
        check(config, mounted, &["s3".to_owned()], &[]).map_or_else(|error| error.to_string(), |notes| notes.join("; "))
    }

    #[test]
    fn what_no_pod_could_reach_is_refused_by_key() {
        assert_eq!(said(&run("s3://b/r", "s3://b/d", "org/sd15"), None), "");
        let from = Config::parse(
            "[run]\noutput = \"s3://b/r\"\n[base]\nmodel = \"org/sd15\"\n[text]\nmodel = \"org/t5\"\n[data]\npath = \"s3://b/d\"\n\
             [connector]\nfrom = \"/m/c.safetensors\"\n",
            "run.toml",
            &[],
        );
        assert!(said(&from.unwrap(), None).starts_with("`connector.from` is \"/m/c.safetensors\""));
        assert!(
            said(&run("runs/a", "s3://b/d", "org/sd15"), None).starts_with("`run.output` is \"runs/a\", but pods see no files of this")
        );
        assert!(said(&run("file:///srv/r", "s3://b/d", "m/x"), None).starts_with("`run.output`"));
        assert!(said(&run("s3://b/r", "/srv/ella/d", "m/x"), None).starts_with("`data.path`"));
        assert!(said(&run("s3://b/r", "s3://b/d", "/models/sd"), None).starts_with("`base.model`"));
        assert!(said(&run("s3://b/r", "s3://b/d", "src"), None).starts_with("`base.model`"), "a folder that is here");
        assert!(said(&run("memory://r", "s3://b/d", "m/x"), None).contains("no such URL"));
        let shared = Some("/srv/ella");
        assert_eq!(said(&run("runs/a", "/srv/ella/d", "models/sd"), shared), "");
        assert!(said(&run("/srv/ellas/a", "d", "m"), shared).contains("the shared folder is at /srv/ella"));
        for out in ["../a", "runs/../../a", "/srv/ella/../a", "file:///srv/ella/.."] {
            let error = said(&run(out, "d", "m"), shared);
            assert!(error.starts_with("`run.output`") && error.contains("it must not have .. in it"), "{out}: {error}");
        }
        assert_eq!(said(&run("runs/a..b", "d", "m"), shared), "");
    }

    #[test]
    fn a_store_without_credentials_is_told_of() {
        let notes = check(&run("gs://b/r", "gs://b/d", "m/x"), None, &[], &[]).unwrap();
        assert_eq!(notes, ["gs:// is used, and no overlay gives the pods credentials for it: --overlay gcs"]);
    }

    #[test]
    fn an_address_at_a_port_that_is_closed_is_told_of() {
        let of = |text: &str, overlay: &str, egress: &[u16]| {
            check(&Config::parse(text, "job.toml", &[]).unwrap(), None, &[overlay.to_owned()], egress).unwrap().join("; ")
        };
        let notes = |source: &str, overlay: &str, egress: &[u16]| {
            of(&format!("[job]\nkind = \"prepare\"\ndata = \"s3://b/d\"\n[prepare]\nsources = [{source:?}]\n"), overlay, egress)
        };
        for (source, port) in [("http://host/a.tar", 80), ("https://host:8443/a.tar", 8443), ("http://[fd00::1]:9000/a.tar", 9000)] {
            let told = format!("`prepare.sources` names an address at port {port}, and pods are not let out there: add --egress {port}");
            assert_eq!(notes(source, "s3", &[]), told);
            assert_eq!(notes(source, "s3", &[port]), "");
        }
        assert_eq!(notes("https://[fd00::1]/a.tar", "s3", &[]), "");
        assert_eq!(notes("http://host/a.tar", "s3-secret", &[]), "");
        let caption = "[job]\nkind = \"caption\"\ndata = \"s3://b/d\"\n[caption.ask]\nendpoint = \"http://host:8000/v1\"\n";
        assert!(of(caption, "s3", &[]).starts_with("`caption.ask.endpoint` names an address at port 8000"));
        assert_eq!(of(caption, "s3", &[8000]), "");
    }

    #[test]
    fn a_jobs_sources_and_models_are_looked_at_too() {
        let job = |sources: &str| {
            let text = format!("[job]\nkind = \"prepare\"\ndata = \"s3://b/d\"\n[prepare]\nsources = [{sources:?}]\n");
            said(&Config::parse(&text, "job.toml", &[]).unwrap(), None)
        };
        assert_eq!(job("https://host/images.tar"), "");
        assert!(job("images.tar").starts_with("`prepare.sources` is \"images.tar\""));
        let embed = "[job]\nkind = \"embed\"\ndata = \"s3://b/d\"\n[embed]\ntext = \"/root/.cache/t5\"\n";
        assert!(said(&Config::parse(embed, "job.toml", &[]).unwrap(), None).starts_with("`embed.text`"));
        let draw = |more: &str| {
            let text = format!("[job]\nkind = \"draw\"\ndata = \"s3://b/g\"\n[draw]\nprompts = \"s3://b/p\"\nbase = \"org/sd15\"\n{more}");
            said(&Config::parse(&text, "job.toml", &[]).unwrap(), None)
        };
        assert_eq!(draw("connector = \"org/ella/tsc.safetensors\"\ntext = \"org/t5\"\n"), "");
        for (key, value) in [("connector", "\"/m/c.safetensors\""), ("text", "\"/m/t5\""), ("loras", "[{ file = \"/m/l.safetensors\" }]")] {
            assert!(draw(&format!("{key} = {value}\n")).starts_with(&format!("`draw.{key}`")), "{key}");
        }
    }
}
