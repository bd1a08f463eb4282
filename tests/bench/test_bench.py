"""Tests of the benchmark scripts themselves: arithmetic, parsing, pictures. They start no peer."""

import os
import sys
import tempfile
import unittest
import xml.dom.minidom

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import bench_tool
import chart
import lab
import report
from report import OURS, Case


def runs(*values, **more):
    return [{"gb_per_s": value, **more} for value in values]


class CaseTest(unittest.TestCase):
    def test_ratio_is_against_the_stronger_peer_round_by_round(self):
        case = Case("x", "gb_per_s", 2.0, {"slow": runs(1, 1, 1), "fast": runs(2, 4, 2), OURS: runs(4, 8, 8)})
        self.assertEqual(case.peer(), "fast")
        self.assertEqual(case.ratios(), [2, 2, 4])
        self.assertTrue(case.met())

    def test_a_missed_goal_is_said(self):
        case = Case("x", "gb_per_s", 2.1, {"fast": runs(2, 4, 2), OURS: runs(4, 8, 4)})
        self.assertFalse(case.met())
        self.assertIn("**no**", "\n".join(report.throughput_table([case])))

    def test_latency_goals_ask_for_less(self):
        case = Case("x", "gb_per_s", 1.3, {"raw": runs(10), OURS: runs(14)}, higher_is_better=False)
        self.assertFalse(case.met())
        self.assertTrue(Case("x", "gb_per_s", 1.5, case.runs, higher_is_better=False).met())

    def test_cpu_is_judged_on_its_own(self):
        case = Case("x", "gb_per_s", 1, {"peer": runs(1, cpu_s_per_gb=2.0), OURS: runs(9, cpu_s_per_gb=1.5)}, cpu_goal=0.5)
        self.assertTrue(case.met())
        self.assertFalse(case.cpu_met())

    def test_a_side_that_is_only_listed_does_not_count(self):
        case = Case("x", "gb_per_s", 1, {"peer": runs(1), "other": runs(100), OURS: runs(2)}, only=["peer"])
        self.assertEqual(case.ratios(), [2])
        other_mode = f"{OURS} in another mode"
        case = Case("x", "gb_per_s", 1, {"peer": runs(1), other_mode: runs(100), OURS: runs(2)})
        self.assertEqual(case.ratios(), [2])


class FinalLineTest(unittest.TestCase):
    def test_both_tools_are_read(self):
        line = "I1122 1 a.cpp:569] Test completed: duration 2.06, batch count 187, throughput 47.56 MB/s"
        self.assertEqual(bench_tool.reads_final_line(line), ("2.06", "187", "47.56", "MB/s"))
        self.assertIsNone(bench_tool.reads_final_line("Worker 3 stopped!"))


class LabTest(unittest.TestCase):
    def test_sizes_are_named_in_the_largest_whole_unit(self):
        self.assertEqual([lab.size(count) for count in (64, 4096, 1 << 20, 3 << 29)], ["64 B", "4 KiB", "1 MiB", "1536 MiB"])

    def test_cpu_of_a_busy_child_is_seen_and_it_ends_with_stop(self):
        child = lab.Process([sys.executable, "-c", "print('ready', flush=True)\nwhile True: pass"])
        child.expect("ready")
        before = child.cpu_s()
        with lab.Sampler([child]) as sampler:
            while child.cpu_s() - before < 0.3:
                pass
        begin, end = sampler.samples[0][0], sampler.samples[-1][0]
        self.assertGreater(sampler.cpu_per_s(begin, end), 0.1)
        child.pause()
        child.stop()
        self.assertIsNotNone(child.child.returncode)

    def test_a_child_that_says_nothing_is_named(self):
        child = lab.Process([sys.executable, "-c", "print('other words')"])
        with self.assertRaisesRegex(lab.BenchError, "other words"):
            child.expect("ready", 20)
        child.stop()


class PictureTest(unittest.TestCase):
    def test_charts_are_well_formed_and_inside_their_frame(self):
        sides = {OURS: (4.0, 3.5, 4.2), "A & B": (0.05, 0.04, 0.06)}
        for text in (chart.rows("t <1>", "s", "GB/s", list(sides), [("write 4 KiB", sides, "80 ×")]),
                     chart.lines("t", "s", "items", "µs", {"a": [(10, (1, 0.9, 1.2)), (1000, (1.1, 1, 3))]})):
            picture = xml.dom.minidom.parseString(text).documentElement
            width = float(picture.getAttribute("width"))
            for mark in picture.getElementsByTagName("circle"):
                self.assertTrue(0 <= float(mark.getAttribute("cx")) <= width)

    def test_a_report_holds_what_a_number_needs_to_be_quoted(self):
        with tempfile.TemporaryDirectory() as folder:
            case = Case("write 4 KiB", "gb_per_s", 2, {"peer": runs(1, 2), OURS: runs(4, 5)})
            report.comparison(report.Writer(folder, "self-test"), "T", ["m"], 2, "make bench", [case], "s")
            names = sorted(os.listdir(folder))
            self.assertEqual([name.split("self-test")[1] for name in names], [".md", ".svg"])
            with open(os.path.join(folder, names[0]), encoding="utf-8") as text:
                content = text.read()
            for part in ("machine:", "date:", "commit", "make bench", "2 rounds", "other processes"):
                self.assertIn(part, content)


if __name__ == "__main__":
    unittest.main()
