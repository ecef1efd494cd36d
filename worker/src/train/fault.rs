//! Steps whose loss or gradient is not finite: what of it, in whose samples, and whether the run may go on without the step.

use super::sum::{Fault, Lane};
use super::{TrainError, Trainer};
use crate::feed::StepInput;
use crate::reduce::Collective;
use crate::reduce::fixed::{FixedError, FixedPoint};
use ella_proto::config::Dtype;
use serde_json::json;
use std::fmt;

/// What is not as it must be.
#[derive(Debug)]
pub enum Bad {
    /// The sum of a lane's losses.
    Loss(f64),
    /// An element of a lane's gradient, outside what `exact` reduction holds.
    Element(FixedError),
    /// The 2-norm of the gradient's sum.
    Norm(f64),
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loss(value) => write!(f, "the loss is {value}"),
            Self::Element(error) => error.fmt(f),
            Self::Norm(value) => write!(f, "the gradient's norm is {value}"),
        }
    }
}

/// The lane of an error, where it is of one.
pub(super) fn of_lane(lane: Option<u32>) -> String {
    lane.map_or_else(String::new, |lane| format!(", lane {lane}"))
}

/// What it may be beside the rate and the samples: some U-Nets leave float16's range whatever they are given.
fn hint(base: Dtype) -> &'static str {
    if base == Dtype::Fp16 { "; or float16 overflows in this base: base.dtype = \"bf16\" or \"fp32\" has the range" } else { "" }
}

/// Numbers by which ranks tell each other of a lane: whether it has a fault, its loss, and an element's index, plus 1, and value; 0 for none.
const NUMBERS: usize = 4;

impl Fault {
    fn is_one(&self) -> bool {
        !self.loss.is_finite() || self.element.is_some()
    }

    fn numbers(&self) -> [i64; NUMBERS] {
        let (index, value) = self.element.map_or((0, 0), |(index, value)| (index as i64 + 1, i64::from(value.to_bits())));
        [i64::from(self.is_one()), self.loss.to_bits() as i64, index, value]
    }

    fn from_numbers([_, loss, index, value]: [i64; NUMBERS]) -> Self {
        let element = (index > 0).then(|| (index as usize - 1, f32::from_bits(value as u32)));
        Self { loss: f64::from_bits(loss as u64), element }
    }
}

impl Trainer {
    /// Of a step with a number that is not finite, which no rank applies: lists this rank's samples, and says what is wrong, the same on all ranks. Nothing
    /// if so many such steps in a row may be left out.
    pub(super) fn leave_out(&mut self, input: &StepInput, lanes: &[Lane], norm: f64) -> Result<(), TrainError> {
        let step = self.state.step + 1;
        let mine = lanes.iter().map(|lane| Ok((lane.lane, lane.fault()?))).collect::<Result<Vec<_>, tch::TchError>>()?;
        let samples = self.list_samples(step, input, &mine) + hint(self.config.base.dtype);
        let first = first_of_all(&mine, self.config.train.lanes(), self.collective.as_mut())?;
        let fixed = FixedPoint::new(self.config.train.lanes() as u32);
        let (lane, bad) = match first {
            Some((lane, Fault { loss, element: Some((index, value)) })) if loss.is_finite() => {
                (Some(lane), Bad::Element(fixed.refusal(index, value)))
            }
            Some((lane, Fault { loss, .. })) => (Some(lane), Bad::Loss(loss)),
            None => (None, Bad::Norm(norm)),
        };
        let error = TrainError::NotFinite { step, lane, bad, samples };
        let most = self.config.train.skip_nonfinite;
        if self.not_finite >= most {
            return Err(error);
        }
        self.not_finite += 1;
        tracing::warn!("{error}; the step is left out, {} in a row (train.skip_nonfinite = {most})", self.not_finite);
        Ok(())
    }

    /// Puts a list of this rank's samples of the step into the run folder, and says where it is.
    fn list_samples(&self, step: u64, input: &StepInput, faults: &[(u32, Fault)]) -> String {
        let folder = format!("failed/step-{step:012}");
        let lanes: Vec<_> = faults
            .iter()
            .map(|(number, fault)| {
                let keys = input.lanes.iter().find(|lane| lane.lane == *number).map_or(&[][..], |lane| &lane.keys);
                // As words: JSON has no number for what is not finite.
                let element = fault.element.map(|(index, value)| json!({ "index": index, "value": value.to_string() }));
                json!({ "lane": number, "loss": fault.loss.to_string(), "gradient": element, "samples": keys })
            })
            .collect();
        let rank = self.collective.rank();
        let list = json!({ "step": step, "rank": rank, "epoch": input.epoch, "lanes": lanes });
        match self.committer.put(&format!("{folder}/rank-{rank}.json"), list.to_string().into_bytes()) {
            Ok(()) => format!("{folder}/ in the run's folder lists them"),
            Err(error) => format!("they could not be listed in {folder}/ of the run's folder ({error})"),
        }
    }
}

/// The first lane of all ranks' that has a fault.
fn first_of_all(mine: &[(u32, Fault)], lanes: usize, collective: &mut dyn Collective) -> Result<Option<(u32, Fault)>, TrainError> {
    let mut all = vec![[0; NUMBERS]; lanes];
    for (lane, fault) in mine {
        if let Some(place) = all.get_mut(*lane as usize) {
            *place = fault.numbers();
        }
    }
    // Each lane is of one rank: a sum of its numbers is the numbers.
    collective.sum_i64(all.as_flattened_mut())?;
    let first = (0..).zip(all).find(|(_, numbers)| numbers[0] != 0);
    Ok(first.map(|(lane, numbers)| (lane, Fault::from_numbers(numbers))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reduce::InProcess;

    #[test]
    fn a_base_in_float16_is_told_to_be_a_cause() {
        let said = |base| {
            let (bad, samples) = (Bad::Loss(f64::NAN), "they are listed".to_owned() + hint(base));
            TrainError::NotFinite { step: 1, lane: None, bad, samples }.to_string()
        };
        assert!(said(Dtype::Fp32).ends_with("they are listed") && said(Dtype::Bf16).ends_with("they are listed"));
        let half = said(Dtype::Fp16);
        assert!(half.contains("the loss is NaN; lower train.optimizer.lr") && half.contains("base.dtype = \"bf16\""), "{half}");
    }

    #[test]
    fn all_ranks_name_the_first_lane_with_a_fault() {
        let fine = Fault { loss: 1.5, element: None };
        let (nan, large) = (Fault { loss: f64::NAN, ..fine }, Fault { element: Some((0, f32::NEG_INFINITY)), ..fine });
        for (lanes, expected) in [([fine, fine, large, nan], Some(2)), ([fine, nan, fine, fine], Some(1)), ([fine; 4], None)] {
            let found: Vec<_> = std::thread::scope(|scope| {
                let rank = |(number, mut rank): (u32, InProcess)| {
                    let mine = [2 * number, 2 * number + 1].map(|lane| (lane, lanes[lane as usize]));
                    scope.spawn(move || first_of_all(&mine, 4, &mut rank).unwrap())
                };
                let threads: Vec<_> = (0..).zip(InProcess::group(2)).map(rank).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for found in found {
                assert_eq!(found.map(|(lane, _)| lane), expected);
                let fault = found.map(|(_, fault)| fault);
                assert_eq!(fault.and_then(|fault| fault.element), expected.and_then(|lane| lanes[lane as usize].element));
                assert_eq!(fault.map(|fault| fault.loss.to_bits()), expected.map(|lane| lanes[lane as usize].loss.to_bits()));
            }
        }
    }
}
