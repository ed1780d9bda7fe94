// How the work of decoding is cut: lines, strips and parts.
//
// A line is the queries of one sequence that stand in one row block. A strip is a line of query
// heads that share their lists, and a part is a range of its list: LeanAttention's split
// (arXiv:2405.10480), but of a fixed size that follows from the strip alone, so that its bits do
// not depend on what else is in the batch.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "paged.h"
#include "work.h"

namespace s2 {

constexpr int64_t STRIP_ROWS = 256;  // most rows of a strip of several heads
constexpr int64_t FEW_ROWS = 8;      // up to which vectors run along the width
constexpr int64_t PART_KEYS = 1024;  // of a part, for up to `FEW_ROWS` rows

struct Line {
    int64_t sequence, row, low, tokens, query;
};

struct Strip {
    Line line;
    int64_t kv_head, layout_head, head, heads;
    int64_t begin, end;      // the list
    int64_t step;            // entries of a part
    int64_t parts, partial;  // where its first part leaves its sums, in floats

    int64_t rows() const { return heads * line.tokens; }
};

struct Part {
    int64_t strip, number;
};

inline int64_t padded(int64_t width) { return round_up(width, W); }

// Floats of the sums of one part: weighted values, and m and l of each row.
inline int64_t part_floats(const Decode& call, const Strip& strip) {
    return round_up(strip.rows() * (padded(call.v_width) + 2), W);
}

// Lines of a packed layout, as far as they lie in the call.
inline void lines_of_spans(const Decode& call, std::vector<Line>& lines) {
    for (int64_t row = 0; row < call.lines; row++) {
        const Line line{call.q_sequence[row], row, 0, call.q_length[row], call.q_start[row]};
        if (line.sequence < call.sequences && line.query + line.tokens <= call.total)
            lines.push_back(line);
    }
}

// Lines of sequences whose last queries stand at their last positions.
inline void lines_by_position(const Decode& call, std::vector<Line>& lines) {
    const int64_t room = call.table.entries * call.page_size;
    int64_t begin = 0, even = call.total / std::max<int64_t>(call.sequences, 1);
    for (int64_t s = 0; s < call.sequences; s++) {
        if (call.cu_q) begin = std::max(begin, std::clamp<int64_t>(call.cu_q[s], 0, call.total));
        else begin = s * even;
        int64_t end =
            call.cu_q ? std::clamp<int64_t>(call.cu_q[s + 1], 0, call.total) : begin + even;
        end = std::max(begin, end);
        const int64_t length = std::clamp<int64_t>(call.lengths[s], 0, room);
        const int64_t before = length - (end - begin);  // position of the first query
        if (end == begin) continue;
        for (int64_t row = std::max<int64_t>(before, 0) / call.block;
            row * call.block < length && row < call.lines; row++) {
            const int64_t low = std::max(before - row * call.block, (int64_t)0);
            const int64_t high = std::min(length - row * call.block, call.block);
            lines.push_back({s, row, low, high - low, begin + row * call.block + low - before});
        }
    }
}

inline std::vector<Strip> strips_of(const Decode& call) {
    std::vector<Line> lines;
    if (call.packed) lines_of_spans(call, lines);
    else lines_by_position(call, lines);
    const int64_t units = std::lcm(call.layout_heads, call.kv_heads), per_unit = call.heads / units;
    std::vector<Strip> strips;
    int64_t floats = 0;
    for (const Line& line : lines)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t layout_head = unit * call.layout_heads / units;
            const int64_t* ptr = call.ptr + layout_head * (call.lines + 1) + line.row;
            if (ptr[0] == ptr[1]) continue;
            const int64_t most = std::max<int64_t>(1, STRIP_ROWS / line.tokens);
            for (int64_t head = 0; head < per_unit; head += most) {
                Strip strip{line, unit * call.kv_heads / units, layout_head, unit * per_unit + head,
                    std::min(most, per_unit - head), ptr[0], ptr[1], 0, 0, floats};
                const int64_t keys = PART_KEYS * std::max<int64_t>(1, strip.rows() / FEW_ROWS);
                strip.step = std::max<int64_t>(1, keys / call.block);
                strip.parts = (strip.end - strip.begin + strip.step - 1) / strip.step;
                floats += strip.parts * part_floats(call, strip);
                strips.push_back(strip);
            }
        }
    return strips;
}

// All parts; those of the heads of a line at the same place of their lists are neighbours, since
// the keys of several heads lie next to each other.
inline std::vector<Part> parts_of(const std::vector<Strip>& strips) {
    std::vector<Part> parts;
    for (size_t begin = 0, end; begin < strips.size(); begin = end) {
        int64_t most = 0;
        for (end = begin; end < strips.size() && strips[end].line.query == strips[begin].line.query;
            end++)
            most = std::max(most, strips[end].parts);
        for (int64_t p = 0; p < most; p++)
            for (size_t i = begin; i < end; i++)
                if (p < strips[i].parts) parts.push_back({(int64_t)i, p});
    }
    return parts;
}

}  // namespace s2
