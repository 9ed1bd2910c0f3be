"""Counting what a program sends, on texts of which the answer is known."""

import pytest

from train.collectives import Collective, _groups, collectives, summary

MODULE = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %g = bf16[32,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %r = f32[32,16]{1,0} all-reduce(%g), replica_groups={{0,4},{1,5}}, to_apply=%add
  %s = f32[16,16]{1,0} dynamic-slice(%r, %c, %c), dynamic_slice_sizes={16,16}
}

%condition (p: (s32[], f32[8,16])) -> pred[] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(40)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = (s32[], f32[8,16]{1,0}) while(%t), condition=%condition, body=%body
  %n = f32[] all-reduce(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  %alone = f32[] all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add
  %two = (f32[8]{0}, s32[4]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add
  %start = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %one = f32[8]{0} all-reduce-start(%x), replica_groups=[4,2]<=[8], to_apply=%add
  %both = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x, %z), replica_groups=[4,2]<=[8]
  %pair = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x), replica_groups=[4,2]<=[8], to_apply=%add
  %pairs = ((f32[8], f32[2]), (f32[8], f32[2])) all-reduce-start(%x, %y), replica_groups=[4,2]<=[8]
  %done = f32[8]{0} all-reduce-done(%one)
  %moved = u8[10]{0} collective-permute(%x), source_target_pairs={{0,3},{3,1}}
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%w), index=1, metadata={op_name="%n %two"}
}
"""


def test_loops_groups_dtypes_and_slices():
    found = collectives(MODULE)
    assert found == [
        Collective("all-gather", 2 * 32 * 16, (0, 1, 2, 3), 40),
        Collective("reduce-scatter", 4 * 32 * 16, (0, 4), 40),
        Collective("all-reduce", 4, (0, 2, 4, 6), 1),
        Collective("all-reduce", 4 * 8 + 4 * 4, tuple(range(8)), 1),
        Collective("all-gather", 4 * 16, (0, 1), 1),
        Collective("all-reduce", 4 * 8, (0, 1), 1),
        Collective("all-reduce", 4 * 16, (0, 1), 1),
        Collective("all-reduce", 4 * 8, (0, 1), 1),
        Collective("all-reduce", 4 * 10, (0, 1), 1),
        Collective("collective-permute", 10, (0, 1, 3), 1),
    ]
    assert summary(found) == {
        "all-gather": (41, 40 * 1024 * 3 / 4 + 64 / 2),
        "all-reduce": (6, 2 * (4 * 3 / 4 + 48 * 7 / 8 + (32 + 64 + 32 + 40) / 2)),
        "reduce-scatter": (40, 40 * 2048 / 2),
        "collective-permute": (1, 10),
    }


def test_an_annotated_trip_count_goes_first():
    annotated = MODULE.replace("body=%body", 'body=%body, config={"known_trip_count":{"n":"7"}}')
    assert collectives(annotated)[0].times == 7


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("{{3,5},{1,7}}", [3, 5]),
        ("[2,4]<=[8], x=1", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2]),
        ("mesh['a'=8,'b'=1], device_ids=([2,4]T(1,0)) {'a'}", [0, 4, 1, 5, 2, 6, 3, 7]),
    ],
)
def test_groups(text, first):
    assert _groups(text)[0].tolist() == first


def test_a_reduce_scatter_is_counted_by_what_goes_in():
    text = """
ENTRY %main (x: f32[8,16]) -> f32[4,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %s = f32[4,16]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}
"""  # noqa: E501
    assert collectives(text) == [Collective("reduce-scatter", 4 * 8 * 16, (0, 1), 1)]
