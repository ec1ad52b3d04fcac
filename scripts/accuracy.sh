#!/usr/bin/env bash
# Every number, table and plot of docs/accuracy.md. Records are kept in target/ruler: what was interrupted goes on where it stopped.
#   scripts/accuracy.sh [PART...]      parts: tasks blocks anchors ablation mass long; all by default
# Tables go to docs/accuracy/*.txt, the same rows to *.csv, plots to *.svg. On two cores it takes about 45 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=("$@")
[ $# -gt 0 ] || parts=(tasks blocks anchors ablation mass long)
cargo build --release --features candle --example ruler
ruler=target/release/examples/ruler
records=target/ruler
tables=docs/accuracy
needles=niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,niah_multiquery
mkdir -p "$records" "$tables"

for part in "${parts[@]}"; do
    echo "== $part" >&2
    case $part in
    # All tasks, blocks and anchor of a quarter of the context.
    tasks)
        "$ruler" run --len 512,1024,2048,4096 --samples 50 --out "$records/tasks.jsonl" \
            --csv "$tables/tasks.csv" --plot "$tables/tasks.svg" >"$tables/tasks.txt"
        ;;
    # 8 tasks, 63 samples each: 504.
    blocks)
        "$ruler" run --tasks "$needles" --len 2048 --samples 63 --block /2,/4,/8,/16,/32 --out "$records/blocks.jsonl" \
            --csv "$tables/blocks.csv" --plot "$tables/blocks.svg" >"$tables/blocks.txt"
        ;;
    anchors)
        "$ruler" run --tasks "$needles" --len 2048 --samples 63 --anchor 0,1,/64,/16,/4,/1 --out "$records/anchors.jsonl" \
            --csv "$tables/anchors.csv" --plot "$tables/anchors.svg" >"$tables/anchors.txt"
        ;;
    ablation)
        "$ruler" ablation --len 2048 --samples 63 --out "$records/ablation.jsonl" --csv "$tables/ablation.csv" \
            >"$tables/ablation.txt"
        ;;
    mass)
        "$ruler" mass --len 2048 --samples 20 >"$tables/mass.txt"
        ;;
    long)
        "$ruler" long --plot "$tables/long.svg" >"$tables/long.txt"
        ;;
    *)
        echo "no part $part" >&2
        exit 2
        ;;
    esac
done
