//! What the standard environment variables ask for.

/// Of how many steps one is traced, if nothing is said.
const EVERY: u64 = 100;

/// The settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A variable has a value that means nothing, or nothing here.
    #[error("{variable}={value}: {rule}")]
    Variable {
        /// Which.
        variable: &'static str,
        /// What it has.
        value: String,
        /// What it may have.
        rule: &'static str,
    },
    /// The exporter cannot be made of what is said.
    #[error("traces cannot be sent: {0}; look at the OTEL_EXPORTER_OTLP_* variables")]
    Exporter(String),
}

/// Whether and what is traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Of so many steps one is traced; 0: none is.
    pub every: u64,
}

impl Settings {
    /// As the environment has it; none if traces are off.
    ///
    /// # Errors
    /// If a variable has a value that means nothing here.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, TraceError> {
        let get = |name: &str| variable(name).filter(|value| !value.is_empty());
        let wanted = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"].iter().any(|name| get(name).is_some());
        if !wanted || get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        match get("OTEL_TRACES_EXPORTER").as_deref() {
            Some("none") => return Ok(None),
            None | Some("otlp") => {}
            Some(value) => return Err(bad("OTEL_TRACES_EXPORTER", value, "only otlp and none are known here")),
        }
        for name in ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"] {
            if let Some(value) = get(name).filter(|value| value != "grpc") {
                return Err(bad(name, &value, "only grpc is spoken here (port 4317 of most collectors)"));
            }
        }
        let ratio = get("OTEL_TRACES_SAMPLER_ARG");
        let sampler = get("OTEL_TRACES_SAMPLER");
        let every = match sampler.as_deref().map(|name| name.strip_prefix("parentbased_").unwrap_or(name)) {
            Some("always_on") => 1,
            Some("always_off") => 0,
            None | Some("traceidratio") => ratio.map_or(Ok(EVERY), |ratio| every(&ratio))?,
            Some(_) => {
                return Err(bad(
                    "OTEL_TRACES_SAMPLER",
                    &sampler.unwrap_or_default(),
                    "always_on, always_off or traceidratio are known here",
                ));
            }
        };
        Ok(Some(Self { every }))
    }
}

/// A share of the steps as one of so many: all processes must pick the same ones.
fn every(ratio: &str) -> Result<u64, TraceError> {
    match ratio.parse::<f64>() {
        Ok(0.0) => Ok(0),
        Ok(share) if share > 0.0 && share <= 1.0 => Ok((1.0 / share).round() as u64),
        _ => Err(bad("OTEL_TRACES_SAMPLER_ARG", ratio, "a share of the steps is expected, from 0 to 1")),
    }
}

fn bad(variable: &'static str, value: &str, rule: &'static str) -> TraceError {
    TraceError::Variable { variable, value: value.to_owned(), rule }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(set: &[(&str, &str)]) -> Result<Option<u64>, String> {
        let get = |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Settings::of(get).map(|settings| settings.map(|settings| settings.every)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_standard_variables_are_minded() {
        const ON: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4317");
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&[("OTEL_TRACES_SAMPLER_ARG", "nonsense")]), Ok(None), "nothing is on");
        assert_eq!(of(&[ON]), Ok(Some(100)));
        assert_eq!(of(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4317")]), Ok(Some(100)));
        assert_eq!(of(&[ON, ("OTEL_SDK_DISABLED", "True")]), Ok(None));
        assert_eq!(of(&[ON, ("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        assert_eq!(of(&[ON, ("OTEL_TRACES_SAMPLER", "parentbased_always_on")]), Ok(Some(1)));
        assert_eq!(of(&[ON, ("OTEL_TRACES_SAMPLER", "always_off")]), Ok(Some(0)));
        assert_eq!(of(&[ON, ("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "0.05")]), Ok(Some(20)));
        for bad in [
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
            ("OTEL_TRACES_SAMPLER_ARG", "often"),
            ("OTEL_TRACES_SAMPLER", "jaeger_remote"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
        ] {
            let error = of(&[ON, bad]).unwrap_err();
            assert!(error.starts_with(&format!("{}={}: ", bad.0, bad.1)), "{error}");
        }
    }
}
