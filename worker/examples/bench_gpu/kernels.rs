//! Which family a kernel belongs to, by its name.

/// Families, and what names of their kernels contain, in lower case. The first row that fits counts: convolutions come before the products
/// that they are made of, changes of layout and copies before the element-wise loops that do them, random normal numbers before norms.
const FAMILIES: [(&str, &[&str]); 10] = [
    ("attention", &["flash", "fmha", "sdpa", "attention", "softmax", "_mha_", "dot_do_o", "convert_dq"]),
    ("copy", &["nchwtonhwc", "nhwctonchw", "tensortransform", "converttensor"]),
    ("convolution", &["implicit", "fprop", "dgrad", "wgrad", "conv2d", "convolve", "convolution", "winograd", "im2col", "col2im"]),
    ("gemm", &["gemm", "nvjet", "cublas", "cutlass", "gemv", "splitk", "matmul"]),
    ("elementwise", &["distribution"]),
    ("reduce", &["reduce_kernel"]),
    ("norm", &["norm", "rowwisemoments", "computefusedparams", "internalgradient"]),
    ("reduce", &["reduce", "nccl"]),
    ("copy", &["memcpy", "memset", "copy", "catarray", "fill", "transpose", "pad_nd"]),
    (
        "elementwise",
        &["elementwise", "vectorized", "unrolled", "foreach", "multi_tensor", "upsample", "index", "gelu", "geglu", "bias", "adamw"],
    ),
];

/// What fits no family.
const OTHER: &str = "other";

/// The family of a kernel of this name.
pub(crate) fn family(name: &str) -> &'static str {
    let name = name.to_ascii_lowercase();
    FAMILIES.iter().find(|(_, parts)| parts.iter().any(|part| name.contains(part))).map_or(OTHER, |(family, _)| family)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names as libraries have them.
    #[test]
    fn kernels_fall_into_their_families() {
        for (name, expected) in [
            ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cgasize2x1x1", "convolution"),
            ("sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
            ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x5_nhwc_align8>", "convolution"),
            ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
            ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1", "gemm"),
            ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "gemm"),
            ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4>>", "attention"),
            ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0", "attention"),
            ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<>::Params)", "attention"),
            ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>", "attention"),
            ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float, float const*)", "norm"),
            ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>", "norm"),
            ("norm_sums_bf16", "norm"),
            ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>", "copy"),
            ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>", "copy"),
            ("Memcpy HtoD (Pinned -> Device)", "copy"),
            ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::OpaqueType<2u>, unsigned int, 4, 64>", "copy"),
            (
                "void at::native::vectorized_elementwise_kernel<8, at::native::(anonymous namespace)::silu_kernel(at::TensorIteratorBase&)>",
                "elementwise",
            ),
            ("geglu_forward_bf16", "elementwise"),
            ("void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16>", "elementwise"),
            ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<double, at::native::func_wrapper_t<double>>>", "reduce"),
            ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce"),
            (
                "void at::native::(anonymous namespace)::distribution_elementwise_grid_stride_kernel<float, 4, normal_and_transform>",
                "elementwise",
            ),
            ("some_new_kernel", OTHER),
        ] {
            assert_eq!(family(name), expected, "{name}");
        }
    }
}
