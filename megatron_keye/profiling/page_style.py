# SPDX-License-Identifier: Apache-2.0
"""Colours and layout of the page, for light and dark screens.

The colours of groups and passes are Okabe and Ito's, which colour-blind people tell apart too.
"""

STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --quiet: #5b6570; --line: #d9dee3; --faint: #f1f3f5;
  --c0: #009e73; --c1: #0072b2; --c2: #56b4e9; --c3: #e69f00; --c4: #b8a9c9; --c5: #cc79a7;
  --c6: #d55e00; --c7: #f0e442; --c8: #6c7680; --c9: #e4e8eb;
  --forward: #56b4e9; --backward: #0072b2; --recomputed: #e69f00; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --ink: #e6e9ec; --quiet: #9aa5b0;
  --line: #333b44; --faint: #20262d; --c1: #3d9bd6; --c8: #929ca6; --c9: #2b323a;
  --backward: #2f8fcb; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 48px; max-width: 1000px; background: var(--paper);
  color: var(--ink); font: 14px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 4px; }
p { margin: 4px 0 10px; color: var(--quiet); max-width: 90ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px;
  margin: 16px 0 8px; }
.tile { background: var(--faint); border-radius: 6px; padding: 10px 12px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--quiet); font-size: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 12px;
  border-bottom: 1px solid var(--line); padding: 4px 8px 4px 0; vertical-align: bottom; }
td { padding: 3px 8px 3px 0; border-bottom: 1px solid var(--faint); white-space: nowrap; }
td.name { white-space: normal; overflow-wrap: anywhere; }
td.code { font: 12px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; white-space: normal;
  overflow-wrap: anywhere; }
.number { text-align: right; } .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; } svg text { fill: var(--ink); }
svg text.quiet { fill: var(--quiet); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 10px; font-size: 12px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px;
  margin-right: 5px; vertical-align: -1px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--quiet); }
.timeline rect[fill="white"] { fill: var(--paper); }
.timeline rect[stroke="white"] { stroke: var(--paper); }
.timeline rect[fill="#f4f4f4"] { fill: var(--faint); }
@media (prefers-color-scheme: dark) { .timeline rect[fill="#1d3f66"] { fill: #2f6fb0; }
  .timeline rect[fill="#4f7cac"] { fill: #7fb0e0; }
  .timeline rect[fill="#14665c"] { fill: #1e8a7c; }
  .timeline rect[fill="#8d5a97"] { fill: #b07fbb; } }
"""
