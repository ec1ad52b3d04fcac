//! What the kernels are told: bindgen's view of `cuda/params.h`, which has the comments.


#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarTensor {
    pub data: u64,
    pub batch: u64,
    pub seq: u64,
    pub head: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarTensor"][::std::mem::size_of::<StarTensor>() - 32usize];
    ["Alignment of StarTensor"][::std::mem::align_of::<StarTensor>() - 8usize];
    [
        "Offset of field: StarTensor::data",
    ][::std::mem::offset_of!(StarTensor, data) - 0usize];
    [
        "Offset of field: StarTensor::batch",
    ][::std::mem::offset_of!(StarTensor, batch) - 8usize];
    [
        "Offset of field: StarTensor::seq",
    ][::std::mem::offset_of!(StarTensor, seq) - 16usize];
    [
        "Offset of field: StarTensor::head",
    ][::std::mem::offset_of!(StarTensor, head) - 24usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarTile {
    pub batch: u32,
    pub key_batch: u32,
    pub row: u32,
    pub rows: u32,
    pub key_start: u32,
    pub anchor: u32,
    pub start: u32,
    pub visible: u32,
    pub causal: u32,
    pub begin: u32,
    pub end: u32,
    pub splits: u32,
    pub partial: u32,
    pub prefix_batch: u32,
    pub prefix_start: u32,
    pub prefix_len: u32,
    pub hidden: i32,
    pub first_range: u32,
    pub ranges: u32,
    pub padding: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarTile"][::std::mem::size_of::<StarTile>() - 80usize];
    ["Alignment of StarTile"][::std::mem::align_of::<StarTile>() - 4usize];
    [
        "Offset of field: StarTile::batch",
    ][::std::mem::offset_of!(StarTile, batch) - 0usize];
    [
        "Offset of field: StarTile::key_batch",
    ][::std::mem::offset_of!(StarTile, key_batch) - 4usize];
    ["Offset of field: StarTile::row"][::std::mem::offset_of!(StarTile, row) - 8usize];
    [
        "Offset of field: StarTile::rows",
    ][::std::mem::offset_of!(StarTile, rows) - 12usize];
    [
        "Offset of field: StarTile::key_start",
    ][::std::mem::offset_of!(StarTile, key_start) - 16usize];
    [
        "Offset of field: StarTile::anchor",
    ][::std::mem::offset_of!(StarTile, anchor) - 20usize];
    [
        "Offset of field: StarTile::start",
    ][::std::mem::offset_of!(StarTile, start) - 24usize];
    [
        "Offset of field: StarTile::visible",
    ][::std::mem::offset_of!(StarTile, visible) - 28usize];
    [
        "Offset of field: StarTile::causal",
    ][::std::mem::offset_of!(StarTile, causal) - 32usize];
    [
        "Offset of field: StarTile::begin",
    ][::std::mem::offset_of!(StarTile, begin) - 36usize];
    ["Offset of field: StarTile::end"][::std::mem::offset_of!(StarTile, end) - 40usize];
    [
        "Offset of field: StarTile::splits",
    ][::std::mem::offset_of!(StarTile, splits) - 44usize];
    [
        "Offset of field: StarTile::partial",
    ][::std::mem::offset_of!(StarTile, partial) - 48usize];
    [
        "Offset of field: StarTile::prefix_batch",
    ][::std::mem::offset_of!(StarTile, prefix_batch) - 52usize];
    [
        "Offset of field: StarTile::prefix_start",
    ][::std::mem::offset_of!(StarTile, prefix_start) - 56usize];
    [
        "Offset of field: StarTile::prefix_len",
    ][::std::mem::offset_of!(StarTile, prefix_len) - 60usize];
    [
        "Offset of field: StarTile::hidden",
    ][::std::mem::offset_of!(StarTile, hidden) - 64usize];
    [
        "Offset of field: StarTile::first_range",
    ][::std::mem::offset_of!(StarTile, first_range) - 68usize];
    [
        "Offset of field: StarTile::ranges",
    ][::std::mem::offset_of!(StarTile, ranges) - 72usize];
    [
        "Offset of field: StarTile::padding",
    ][::std::mem::offset_of!(StarTile, padding) - 76usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarRange {
    pub entry: u32,
    pub key: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarRange"][::std::mem::size_of::<StarRange>() - 8usize];
    ["Alignment of StarRange"][::std::mem::align_of::<StarRange>() - 4usize];
    [
        "Offset of field: StarRange::entry",
    ][::std::mem::offset_of!(StarRange, entry) - 0usize];
    ["Offset of field: StarRange::key"][::std::mem::offset_of!(StarRange, key) - 4usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarFlashParams {
    pub query: StarTensor,
    pub key: StarTensor,
    pub value: StarTensor,
    pub prefix_key: StarTensor,
    pub prefix_value: StarTensor,
    pub out: StarTensor,
    pub lse: u64,
    pub sinks: u64,
    pub key_scales: u64,
    pub value_scales: u64,
    pub tiles: u64,
    pub page_table: u64,
    pub ranges: u64,
    pub partials: u64,
    pub partials_lse: u64,
    pub page_len: u32,
    pub page_magic: u32,
    pub page_shift: u32,
    pub query_len: u32,
    pub query_heads: u32,
    pub head_dim: u32,
    pub value_dim: u32,
    pub key_scale_step: u32,
    pub value_scale_step: u32,
    pub group: u32,
    pub pack: u32,
    pub out_f32: u32,
    pub scale_log2: f32,
    pub cap_scale: f32,
    pub slack: f32,
    pub padding: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarFlashParams"][::std::mem::size_of::<StarFlashParams>() - 328usize];
    ["Alignment of StarFlashParams"][::std::mem::align_of::<StarFlashParams>() - 8usize];
    [
        "Offset of field: StarFlashParams::query",
    ][::std::mem::offset_of!(StarFlashParams, query) - 0usize];
    [
        "Offset of field: StarFlashParams::key",
    ][::std::mem::offset_of!(StarFlashParams, key) - 32usize];
    [
        "Offset of field: StarFlashParams::value",
    ][::std::mem::offset_of!(StarFlashParams, value) - 64usize];
    [
        "Offset of field: StarFlashParams::prefix_key",
    ][::std::mem::offset_of!(StarFlashParams, prefix_key) - 96usize];
    [
        "Offset of field: StarFlashParams::prefix_value",
    ][::std::mem::offset_of!(StarFlashParams, prefix_value) - 128usize];
    [
        "Offset of field: StarFlashParams::out",
    ][::std::mem::offset_of!(StarFlashParams, out) - 160usize];
    [
        "Offset of field: StarFlashParams::lse",
    ][::std::mem::offset_of!(StarFlashParams, lse) - 192usize];
    [
        "Offset of field: StarFlashParams::sinks",
    ][::std::mem::offset_of!(StarFlashParams, sinks) - 200usize];
    [
        "Offset of field: StarFlashParams::key_scales",
    ][::std::mem::offset_of!(StarFlashParams, key_scales) - 208usize];
    [
        "Offset of field: StarFlashParams::value_scales",
    ][::std::mem::offset_of!(StarFlashParams, value_scales) - 216usize];
    [
        "Offset of field: StarFlashParams::tiles",
    ][::std::mem::offset_of!(StarFlashParams, tiles) - 224usize];
    [
        "Offset of field: StarFlashParams::page_table",
    ][::std::mem::offset_of!(StarFlashParams, page_table) - 232usize];
    [
        "Offset of field: StarFlashParams::ranges",
    ][::std::mem::offset_of!(StarFlashParams, ranges) - 240usize];
    [
        "Offset of field: StarFlashParams::partials",
    ][::std::mem::offset_of!(StarFlashParams, partials) - 248usize];
    [
        "Offset of field: StarFlashParams::partials_lse",
    ][::std::mem::offset_of!(StarFlashParams, partials_lse) - 256usize];
    [
        "Offset of field: StarFlashParams::page_len",
    ][::std::mem::offset_of!(StarFlashParams, page_len) - 264usize];
    [
        "Offset of field: StarFlashParams::page_magic",
    ][::std::mem::offset_of!(StarFlashParams, page_magic) - 268usize];
    [
        "Offset of field: StarFlashParams::page_shift",
    ][::std::mem::offset_of!(StarFlashParams, page_shift) - 272usize];
    [
        "Offset of field: StarFlashParams::query_len",
    ][::std::mem::offset_of!(StarFlashParams, query_len) - 276usize];
    [
        "Offset of field: StarFlashParams::query_heads",
    ][::std::mem::offset_of!(StarFlashParams, query_heads) - 280usize];
    [
        "Offset of field: StarFlashParams::head_dim",
    ][::std::mem::offset_of!(StarFlashParams, head_dim) - 284usize];
    [
        "Offset of field: StarFlashParams::value_dim",
    ][::std::mem::offset_of!(StarFlashParams, value_dim) - 288usize];
    [
        "Offset of field: StarFlashParams::key_scale_step",
    ][::std::mem::offset_of!(StarFlashParams, key_scale_step) - 292usize];
    [
        "Offset of field: StarFlashParams::value_scale_step",
    ][::std::mem::offset_of!(StarFlashParams, value_scale_step) - 296usize];
    [
        "Offset of field: StarFlashParams::group",
    ][::std::mem::offset_of!(StarFlashParams, group) - 300usize];
    [
        "Offset of field: StarFlashParams::pack",
    ][::std::mem::offset_of!(StarFlashParams, pack) - 304usize];
    [
        "Offset of field: StarFlashParams::out_f32",
    ][::std::mem::offset_of!(StarFlashParams, out_f32) - 308usize];
    [
        "Offset of field: StarFlashParams::scale_log2",
    ][::std::mem::offset_of!(StarFlashParams, scale_log2) - 312usize];
    [
        "Offset of field: StarFlashParams::cap_scale",
    ][::std::mem::offset_of!(StarFlashParams, cap_scale) - 316usize];
    [
        "Offset of field: StarFlashParams::slack",
    ][::std::mem::offset_of!(StarFlashParams, slack) - 320usize];
    [
        "Offset of field: StarFlashParams::padding",
    ][::std::mem::offset_of!(StarFlashParams, padding) - 324usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarMergedRow {
    pub batch: u32,
    pub row: u32,
    pub head: u32,
    pub first: u32,
    pub count: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarMergedRow"][::std::mem::size_of::<StarMergedRow>() - 20usize];
    ["Alignment of StarMergedRow"][::std::mem::align_of::<StarMergedRow>() - 4usize];
    [
        "Offset of field: StarMergedRow::batch",
    ][::std::mem::offset_of!(StarMergedRow, batch) - 0usize];
    [
        "Offset of field: StarMergedRow::row",
    ][::std::mem::offset_of!(StarMergedRow, row) - 4usize];
    [
        "Offset of field: StarMergedRow::head",
    ][::std::mem::offset_of!(StarMergedRow, head) - 8usize];
    [
        "Offset of field: StarMergedRow::first",
    ][::std::mem::offset_of!(StarMergedRow, first) - 12usize];
    [
        "Offset of field: StarMergedRow::count",
    ][::std::mem::offset_of!(StarMergedRow, count) - 16usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarPartial {
    pub out: StarTensor,
    pub lse: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarPartial"][::std::mem::size_of::<StarPartial>() - 40usize];
    ["Alignment of StarPartial"][::std::mem::align_of::<StarPartial>() - 8usize];
    [
        "Offset of field: StarPartial::out",
    ][::std::mem::offset_of!(StarPartial, out) - 0usize];
    [
        "Offset of field: StarPartial::lse",
    ][::std::mem::offset_of!(StarPartial, lse) - 32usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarMergeParams {
    pub partials: StarTensor,
    pub out: StarTensor,
    pub partials_lse: u64,
    pub partial_stride: u64,
    pub lse_stride: u64,
    pub lse: u64,
    pub sinks: u64,
    pub merged: u64,
    pub n: u32,
    pub rows: u32,
    pub seq: u32,
    pub heads: u32,
    pub dim: u32,
    pub lanes: u32,
    pub separate: u32,
    pub sink_first: u32,
    pub sink_seq: u32,
    pub sink_heads: u32,
    pub each: [StarPartial; 32usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarMergeParams"][::std::mem::size_of::<StarMergeParams>() - 1432usize];
    ["Alignment of StarMergeParams"][::std::mem::align_of::<StarMergeParams>() - 8usize];
    [
        "Offset of field: StarMergeParams::partials",
    ][::std::mem::offset_of!(StarMergeParams, partials) - 0usize];
    [
        "Offset of field: StarMergeParams::out",
    ][::std::mem::offset_of!(StarMergeParams, out) - 32usize];
    [
        "Offset of field: StarMergeParams::partials_lse",
    ][::std::mem::offset_of!(StarMergeParams, partials_lse) - 64usize];
    [
        "Offset of field: StarMergeParams::partial_stride",
    ][::std::mem::offset_of!(StarMergeParams, partial_stride) - 72usize];
    [
        "Offset of field: StarMergeParams::lse_stride",
    ][::std::mem::offset_of!(StarMergeParams, lse_stride) - 80usize];
    [
        "Offset of field: StarMergeParams::lse",
    ][::std::mem::offset_of!(StarMergeParams, lse) - 88usize];
    [
        "Offset of field: StarMergeParams::sinks",
    ][::std::mem::offset_of!(StarMergeParams, sinks) - 96usize];
    [
        "Offset of field: StarMergeParams::merged",
    ][::std::mem::offset_of!(StarMergeParams, merged) - 104usize];
    [
        "Offset of field: StarMergeParams::n",
    ][::std::mem::offset_of!(StarMergeParams, n) - 112usize];
    [
        "Offset of field: StarMergeParams::rows",
    ][::std::mem::offset_of!(StarMergeParams, rows) - 116usize];
    [
        "Offset of field: StarMergeParams::seq",
    ][::std::mem::offset_of!(StarMergeParams, seq) - 120usize];
    [
        "Offset of field: StarMergeParams::heads",
    ][::std::mem::offset_of!(StarMergeParams, heads) - 124usize];
    [
        "Offset of field: StarMergeParams::dim",
    ][::std::mem::offset_of!(StarMergeParams, dim) - 128usize];
    [
        "Offset of field: StarMergeParams::lanes",
    ][::std::mem::offset_of!(StarMergeParams, lanes) - 132usize];
    [
        "Offset of field: StarMergeParams::separate",
    ][::std::mem::offset_of!(StarMergeParams, separate) - 136usize];
    [
        "Offset of field: StarMergeParams::sink_first",
    ][::std::mem::offset_of!(StarMergeParams, sink_first) - 140usize];
    [
        "Offset of field: StarMergeParams::sink_seq",
    ][::std::mem::offset_of!(StarMergeParams, sink_seq) - 144usize];
    [
        "Offset of field: StarMergeParams::sink_heads",
    ][::std::mem::offset_of!(StarMergeParams, sink_heads) - 148usize];
    [
        "Offset of field: StarMergeParams::each",
    ][::std::mem::offset_of!(StarMergeParams, each) - 152usize];
};
#[repr(C)]
#[derive(Debug, Default, Copy, Clone)]
pub struct StarAppendParams {
    pub key: StarTensor,
    pub value: StarTensor,
    pub shard_key: StarTensor,
    pub shard_value: StarTensor,
    pub places: u64,
    pub positions: u64,
    pub cos: u64,
    pub sin: u64,
    pub key_scales: u64,
    pub value_scales: u64,
    pub batch: u32,
    pub seq: u32,
    pub kv_heads: u32,
    pub dim: u32,
    pub value_dim: u32,
    pub key_scale_step: u32,
    pub value_scale_step: u32,
    pub pages: u32,
    pub page_len: u32,
    pub rotated: u32,
    pub interleaved: u32,
    pub position_end: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of StarAppendParams"][::std::mem::size_of::<StarAppendParams>() - 224usize];
    [
        "Alignment of StarAppendParams",
    ][::std::mem::align_of::<StarAppendParams>() - 8usize];
    [
        "Offset of field: StarAppendParams::key",
    ][::std::mem::offset_of!(StarAppendParams, key) - 0usize];
    [
        "Offset of field: StarAppendParams::value",
    ][::std::mem::offset_of!(StarAppendParams, value) - 32usize];
    [
        "Offset of field: StarAppendParams::shard_key",
    ][::std::mem::offset_of!(StarAppendParams, shard_key) - 64usize];
    [
        "Offset of field: StarAppendParams::shard_value",
    ][::std::mem::offset_of!(StarAppendParams, shard_value) - 96usize];
    [
        "Offset of field: StarAppendParams::places",
    ][::std::mem::offset_of!(StarAppendParams, places) - 128usize];
    [
        "Offset of field: StarAppendParams::positions",
    ][::std::mem::offset_of!(StarAppendParams, positions) - 136usize];
    [
        "Offset of field: StarAppendParams::cos",
    ][::std::mem::offset_of!(StarAppendParams, cos) - 144usize];
    [
        "Offset of field: StarAppendParams::sin",
    ][::std::mem::offset_of!(StarAppendParams, sin) - 152usize];
    [
        "Offset of field: StarAppendParams::key_scales",
    ][::std::mem::offset_of!(StarAppendParams, key_scales) - 160usize];
    [
        "Offset of field: StarAppendParams::value_scales",
    ][::std::mem::offset_of!(StarAppendParams, value_scales) - 168usize];
    [
        "Offset of field: StarAppendParams::batch",
    ][::std::mem::offset_of!(StarAppendParams, batch) - 176usize];
    [
        "Offset of field: StarAppendParams::seq",
    ][::std::mem::offset_of!(StarAppendParams, seq) - 180usize];
    [
        "Offset of field: StarAppendParams::kv_heads",
    ][::std::mem::offset_of!(StarAppendParams, kv_heads) - 184usize];
    [
        "Offset of field: StarAppendParams::dim",
    ][::std::mem::offset_of!(StarAppendParams, dim) - 188usize];
    [
        "Offset of field: StarAppendParams::value_dim",
    ][::std::mem::offset_of!(StarAppendParams, value_dim) - 192usize];
    [
        "Offset of field: StarAppendParams::key_scale_step",
    ][::std::mem::offset_of!(StarAppendParams, key_scale_step) - 196usize];
    [
        "Offset of field: StarAppendParams::value_scale_step",
    ][::std::mem::offset_of!(StarAppendParams, value_scale_step) - 200usize];
    [
        "Offset of field: StarAppendParams::pages",
    ][::std::mem::offset_of!(StarAppendParams, pages) - 204usize];
    [
        "Offset of field: StarAppendParams::page_len",
    ][::std::mem::offset_of!(StarAppendParams, page_len) - 208usize];
    [
        "Offset of field: StarAppendParams::rotated",
    ][::std::mem::offset_of!(StarAppendParams, rotated) - 212usize];
    [
        "Offset of field: StarAppendParams::interleaved",
    ][::std::mem::offset_of!(StarAppendParams, interleaved) - 216usize];
    [
        "Offset of field: StarAppendParams::position_end",
    ][::std::mem::offset_of!(StarAppendParams, position_end) - 220usize];
};
