//! The functions of `cpp/ops.h`.

use std::ffi::{c_char, c_double, c_int, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::gpu::Table;
use crate::{Error, Result, error};

unsafe extern "C" {
    pub(crate) fn ella_error() -> *const c_char;
    pub(crate) fn ella_use_gpu(table: *const Table);
    pub(crate) fn ella_group_norm(
        x: *const C_tensor,
        second: *const C_tensor,
        gamma: *const C_tensor,
        beta: *const C_tensor,
        add: *const C_tensor,
        groups: i64,
        eps: c_double,
        activate: c_int,
        made: *mut *mut C_tensor,
    ) -> c_int;
    pub(crate) fn ella_frozen_conv2d(x: *const C_tensor, weight: *const C_tensor, stride: i64, padding: i64) -> *mut C_tensor;
    pub(crate) fn ella_frozen_double(
        x: *const C_tensor,
        weight: *const C_tensor,
        back: *const C_tensor,
        bias: *const C_tensor,
    ) -> *mut C_tensor;
    pub(crate) fn ella_frozen_half(x: *const C_tensor, weight: *const C_tensor, back: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn ella_pixels(qkv: *const C_tensor, heads: i64) -> *mut C_tensor;
    pub(crate) fn ella_few_keys(q: *const C_tensor, kv: *const C_tensor, heads: i64) -> *mut C_tensor;
    pub(crate) fn ella_geglu(both: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn ella_rms_norm(x: *const C_tensor, weight: *const C_tensor, eps: c_double) -> *mut C_tensor;
    pub(crate) fn ella_gated_gelu(both: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn ella_add_biased(a: *const C_tensor, b: *const C_tensor, more: *const C_tensor, bias: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn ella_add_layer_norm(
        a: *const C_tensor,
        b: *const C_tensor,
        gamma: *const C_tensor,
        beta: *const C_tensor,
        eps: c_double,
        sum: *mut *mut C_tensor,
        y: *mut *mut C_tensor,
    ) -> c_int;
    pub(crate) fn ella_ada_layer_norm(x: *const C_tensor, lead: *const C_tensor, eps: c_double, kind: c_int) -> *mut C_tensor;
    pub(crate) fn ella_square_sums(x: *const C_tensor) -> *mut C_tensor;
    pub(crate) fn ella_adamw(
        p: *const C_tensor,
        g: *const C_tensor,
        m: *const C_tensor,
        v: *const C_tensor,
        ema: *const C_tensor,
        rates: *const f32,
    ) -> c_int;
    pub(crate) fn ella_set_tf32(on: c_int) -> c_int;
    pub(crate) fn ella_set_deterministic(on: c_int) -> c_int;
    pub(crate) fn ella_set_benchmark(on: c_int) -> c_int;
    pub(crate) fn ella_profile_begin(gpu: c_int) -> c_int;
    pub(crate) fn ella_profile_end(user: *mut c_void, each: Each) -> c_int;
}

/// What is called for every event of a profile.
pub(crate) type Each = extern "C" fn(user: *mut c_void, name: *const c_char, on_device: c_int, start_ns: u64, duration_ns: u64);

pub(crate) fn check(code: c_int) -> Result<()> {
    error::check(code, ella_error)
}

/// The tensor that a function returned, or its error.
pub(crate) fn returned(tensor: *mut C_tensor) -> Result<Tensor> {
    if tensor.is_null() {
        return Err(told());
    }
    // SAFETY: not null, so it is a tensor made for the caller, as libtorch's C interface makes them.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

fn told() -> Error {
    error::told(ella_error)
}
