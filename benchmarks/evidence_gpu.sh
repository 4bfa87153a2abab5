#!/usr/bin/env bash
# The evidence sweep where there is no hub, within a time limit; what is finished is packed as it goes.
#
#   bash benchmarks/evidence_gpu.sh TEACHER DOLLY OUT [MINUTES] [further options of dpkd sweep, as --devices 0,0,0,0]
#
# TEACHER  folder or .gguf file of SmolLM2-135M-Instruct        DOLLY  folder with train.jsonl, dev.jsonl, eval.jsonl
# OUT      gets table.md, report.html, sweep.log, evidence.tgz (all but weights and answers) and answers-SEED.tgz
# The runs themselves go to runs/evidence; a second call with the same folder goes on with what is missing.
set -u
TEACHER=$1 DOLLY=$2 OUT=$3 MINUTES=${4:-8}
shift $(($# < 4 ? $# : 4))
RUNS=${RUNS:-runs/evidence}
DPKD="${PYTHON:-python3} -m dpkd.cli.main"
mkdir -p "$OUT" "$RUNS"

pack() {
  tar czf "$OUT/.evidence.tgz" --exclude='model' --exclude='last' --exclude='checkpoints' --exclude='.best' \
    --exclude='.lock' --exclude='predictions-*' -C "$RUNS" . 2>/dev/null
  mv "$OUT/.evidence.tgz" "$OUT/evidence.tgz"
}

$DPKD sweep configs/sweeps/evidence.yaml --set output="$RUNS" --set budget_minutes="$MINUTES" \
  --set teacher.model="$TEACHER" --set data.path="$DOLLY/train.jsonl" --set dev.path="$DOLLY/dev.jsonl" \
  --set "evaluate.data=[$DOLLY/eval.jsonl]" "$@" >"$OUT/sweep.log" 2>&1 &
SWEEP=$!
tail -f "$OUT/sweep.log" --pid=$SWEEP &
while kill -0 $SWEEP 2>/dev/null; do
  sleep 15
  pack
done
wait $SWEEP
STATUS=$?
pack
SCORED=$(ls -d "$RUNS"/*/eval 2>/dev/null | sed 's,/eval$,,')
[ -z "$SCORED" ] || $DPKD compare $SCORED --format markdown >"$OUT/table.md" 2>>"$OUT/sweep.log"
cat "$OUT/table.md" 2>/dev/null
[ -z "$SCORED" ] || $DPKD report "$RUNS" --output "$OUT/report.html" 2>>"$OUT/sweep.log"
for seed in 10 20 30 40 50; do
  (cd "$RUNS" && find . -name "predictions-$seed.jsonl" -path '*/eval/*' -print0 |
    tar czf "$OUT/answers-$seed.tgz" --null -T - 2>/dev/null)
done
exit $STATUS
