// Data sets of tasks -> prompts as T5 was trained on them (Raffel et al. 2020, appendix
// D): "question: ... context: ..." for SQuAD, "qnli question: ... sentence: ..." for
// GLUE. Foreign bytes: as readers.h. Thread rule: pure functions.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "corpus/readers.h"

namespace routecast {

// Between the prompts of one document: no sequence spans it.
inline constexpr char kPromptSeparator = '\x1e';

// The nine tasks, as --data=glue:PATH#TASK names them and prompts begin.
const std::vector<std::string>& GlueTasks();

// A document a paragraph: a prompt a question, or the bare context where it has none.
void ReadSquad(std::string_view bytes, const std::string& what, const RecordSink& sink);

// A document a row: its prompt. `task` is a name of GlueTasks() or empty: then the header
// tells, and where it does not, the name of the file or its folder (RTE/dev.tsv).
// DataError where neither does.
void ReadGlue(const std::string& task, std::string_view bytes, const std::string& what,
              const RecordSink& sink);

}  // namespace routecast
